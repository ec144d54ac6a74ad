"""Children by fork, for tests that kill them at a chosen moment."""

import contextlib
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

_KILLED = 9
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def fork() -> int:
    """``os.fork`` of a process that has run other tests: the child never frees what they left.

    A process group or a pool that waits in a reference cycle belongs to threads that the child does
    not have, and to destroy it there crashes now and then.
    """
    gc.collect()
    gc.freeze()
    child = os.fork()
    if child != 0:
        gc.unfreeze()
    return child


def dies_at(change: int, *, work: Callable[[], object]) -> bool:
    """Do ``work`` in a process that dies, as by SIGKILL, just before its ``change``-th change of
    the disk (opening to write, renaming, removing, making a folder); whether it died."""
    child = fork()
    if child == 0:
        left = [change]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
            if writes or event in _CHANGES:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(_KILLED)

        with contextlib.suppress(BaseException):
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            sys.addaudithook(hook)
            work()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, _KILLED)
    return code == _KILLED
