"""Distillation that dies, as by SIGKILL, at certain changes of the disk and is then run again.

    killed_worker.py RUN PROMPTS FOLDER CHANGES

CHANGES are numbers with commas between, or ``all``: from the first to the one that no longer comes.
The call that dies just before its N-th change of the output folder (opening to write, renaming,
removing, making a folder) writes FOLDER/N. Prints the numbers at which it died.

Every call has a process of its own, forked from this one, which itself computes nothing: a fork of
a process whose threads hold locks would hang.
"""

import contextlib
import itertools
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from distilling import SETTINGS, call

from emu35.stages.distill.options import DistillOptions
from emu35.stages.distill.run import distill

KILLED = 9
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def run_until(change: int | None, *, options: DistillOptions) -> bool:
    """Distil in a process that dies before change ``change``, or never; whether it died."""
    child = os.fork()
    if child == 0:
        try:
            if change is not None:
                sys.addaudithook(killing(change, out=str(options.ask.out)))
            # A kill, unlike a power cut, loses nothing for want of a sync.
            os.fsync = lambda fd: None
            with contextlib.redirect_stdout(sys.stderr):
                distill(options)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), code
    return code == KILLED


def killing(change: int, *, out: str):
    """An audit hook that ends the process at once before change ``change`` below ``out``."""
    count = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        if (writes or event in _CHANGES) and out in str(arguments[0]) and next(count) == change:
            os._exit(KILLED)

    return hook


def main() -> None:
    run, prompts, folder = map(Path, sys.argv[1:4])
    every = sys.argv[4] == "all"
    changes: Iterable[int] = itertools.count(1)
    if not every:
        changes = map(int, sys.argv[4].split(","))
    for change in changes:
        out = folder / str(change)
        options = call(run, prompts, out, **SETTINGS)
        if not run_until(change, options=options):
            out.rename(folder.with_name("not killed"))
            break
        run_until(None, options=options)
        print(change, flush=True)


if __name__ == "__main__":
    main()
