"""What torchrun executes on every rank: the worker, and a word to our launcher about its end.

python -m emu35.run.torchrun_rank RUN_DIR
"""

import os
import sys
from pathlib import Path

import psutil

from emu35.errors import Emu35Error, Interrupted, LaunchError
from emu35.run import outcomes, worker
from emu35.run.rundir import LOGS


def main() -> int:
    """Run this rank to its end; returns the exit code that torchrun is to see."""
    _end_with_launcher()
    run_dir = Path(sys.argv[1])
    if os.environ["RANK"] != "0":
        _print_to(run_dir / LOGS / f"rank{os.environ['RANK']}.log")
    before = {outcome.code for outcome in outcomes.reported(os.environ[outcomes.FOLDER])}
    if Emu35Error.exit_code in before:
        # torchrun starts ranks again after any failure. This one would only be told once more.
        return Emu35Error.exit_code
    outcomes.report(None)
    try:
        worker.run(run_dir)
    except Interrupted as error:
        outcomes.report(worker.tell(error))
        return 0
    except LaunchError as error:
        # Ranks that did not find each other may do so at the next attempt.
        outcomes.report(1)
        return worker.tell(error)
    except Emu35Error as error:
        outcomes.report(error.exit_code)
        return worker.tell(error)
    except BaseException:
        outcomes.report(1)
        raise
    outcomes.report(0)
    return 0


def _end_with_launcher() -> None:
    """Die with torchrun, and at once if it or our launcher above it is gone already.

    A parent that died while this rank was starting is not asked after in vain: whoever adopted the
    rank is no child of the launcher.
    """
    torchrun = os.getppid()
    worker.end_with(torchrun)
    try:
        launcher = psutil.Process(torchrun).ppid()
    except psutil.NoSuchProcess:
        launcher = 0
    if launcher != int(os.environ[worker.SUPERVISOR_PID]):
        worker.leave(1)


def _print_to(log: Path) -> None:
    """As local ranks do: the console shows rank 0, the others have files."""
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)


if __name__ == "__main__":
    worker.end_rank(main)
