"""A small run in ranks of its own; run under torchrun.

Usage: learning_worker.py RUN_DIR RESULT.txt CALLS -- what became of it is written down; rewards
count their calls from CALLS.
"""

import sys
from pathlib import Path

import learning

from emu35.config.io import read_config
from emu35.errors import Interrupted
from emu35.parallel.collectives import is_main
from emu35.parallel.mesh import leave
from emu35.stages.grpo import stage


def main(run_dir: Path, result: Path, calls: int) -> None:
    learning.calls = calls
    try:
        said = f"step {stage.run(read_config(run_dir), run_dir=run_dir).step}"
    except Interrupted as error:
        said = str(error)
    if is_main():
        result.write_text(said)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
