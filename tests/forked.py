"""Children by fork, for tests that kill them at a chosen moment."""

import gc
import os


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
