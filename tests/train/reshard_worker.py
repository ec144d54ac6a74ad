"""Save in several layouts and load each into others, all in one set of processes.

Usage: reshard_worker.py FOLDER '{"precision": ..., "save": {name: layout}, "load": [[name, other,
layout], ...]}'

``FOLDER/NAME`` gets the checkpoint of layout NAME after two steps and ``NAME.json`` the steps that
followed without an interruption; ``FOLDER/NAME--OTHER`` what OTHER saved right after it had loaded
NAME, and ``NAME--OTHER.json`` its steps.
"""

import json
import sys
from pathlib import Path

import torch
from layout_worker import make_steps, make_task, sums

from emu35.parallel.collectives import barrier, is_main
from emu35.parallel.mesh import leave
from emu35.train import rng
from emu35.train.step import LMTask

BEFORE, AFTER = 2, 2


def save(task: LMTask, folder: Path) -> None:
    if is_main():
        folder.mkdir()
    barrier()
    rng.save(folder)
    state = task.save(folder)
    state.write()
    state.finish()


def go_on(task: LMTask, *, result: Path) -> None:
    metrics = make_steps(task, count=AFTER)
    if is_main():
        result.write_text(json.dumps({"metrics": metrics, "sums": sums(task)}))


def main(root: Path, spec: dict) -> None:
    torch.set_num_threads(1)
    common = {"precision": spec["precision"], "dropout": spec["dropout"]}
    for name, layout in spec["save"].items():
        task = make_task({**layout, **common})
        make_steps(task, count=BEFORE)
        save(task, root / name)
        go_on(task, result=root / f"{name}.json")
    for name, other, layout in spec["load"]:
        task = make_task({**layout, **common})
        task.load(root / name)
        rng.load(root / name)
        save(task, root / f"{name}--{other}")
        go_on(task, result=root / f"{name}--{other}.json")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
