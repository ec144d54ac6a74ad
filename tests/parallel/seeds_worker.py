"""Draw random numbers on every rank, outside and inside megatron-core's tracker, for several
layouts of the same ranks; run under torchrun. Usage: seeds_worker.py RESULT.json"""

import json
import sys
from pathlib import Path

import torch

from emu35.checkpoint.agree import gather
from emu35.config import ParallelConfig
from emu35.parallel.collectives import is_main
from emu35.parallel.mesh import init_mesh, leave


def draw(parallel: ParallelConfig) -> list[dict]:
    mesh = init_mesh(parallel, seed=7)
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    assert tracker is not None
    with tracker.fork():
        inside = torch.rand(8).tolist()
    place = {"tp": mesh.tp_rank, "pp": mesh.pp_rank, "cp": mesh.cp_rank, "dp": mesh.dp_rank}
    return gather({**place, "outside": torch.rand(8).tolist(), "inside": inside})


def main(result: Path) -> None:
    layouts = {
        "tp2-dp2": ParallelConfig(tp=2),
        "tp2-cp2": ParallelConfig(tp=2, cp=2),
        "cp2-dp2": ParallelConfig(cp=2),
        "pp2-dp2": ParallelConfig(pp=2),
        "dp4": ParallelConfig(),
    }
    drawn = {name: draw(parallel) for name, parallel in layouts.items()}
    if is_main():
        result.write_text(json.dumps(drawn))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
