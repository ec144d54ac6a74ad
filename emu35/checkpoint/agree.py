"""Doing something on every rank and failing on all of them when it failed on one.

A save that goes wrong on one rank must not leave the others waiting in the next collective, nor
believing that it worked. So each part of a save ends by exchanging what went wrong.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from emu35.errors import CheckpointError, Emu35Error
from emu35.parallel.collectives import world_size

T = TypeVar("T")

STORAGE_SIGNS = ("PytorchStreamWriter", "PytorchStreamReader", "inline_container", "iostream")
"""How torch words a failed write or read: a plain RuntimeError without an error number."""


def gather(value: T) -> list[T]:
    """The ``value`` of every rank, in rank order. Collective."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def on_all_ranks(action: Callable[[], T], *, blame: Callable[[str], str]) -> T:
    """Run ``action`` here and return its result, once every rank has succeeded. Collective.

    Raises:
        CheckpointError: on every rank, when ``action`` failed somewhere with a storage error or
            an error of ours; the text is rank 0's ``blame(reasons)``, the same everywhere.
        BaseException: what ``action`` raised on this rank when it is neither: that is a bug, and it
            keeps its traceback (the other ranks get the CheckpointError).
    """
    result: list[T] = []
    error: BaseException | None = None
    try:
        result.append(action())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as caught:  # torch's CheckpointException is no Exception
        error = caught
    reasons = gather(None if error is None else _describe(error))
    if not any(reasons):
        return result[0]
    several = len(reasons) > 1
    text = "; ".join(
        f"rank {rank}: {reason}" if several else reason
        for rank, reason in enumerate(reasons)
        if reason
    )
    words = gather(blame(text))[0]
    if error is not None and not is_storage_error(error) and not isinstance(error, Emu35Error):
        raise error
    raise CheckpointError(words) from error


def is_storage_error(error: BaseException) -> bool:
    """Whether ``error``, or what caused it, comes from the filesystem."""
    return any(
        isinstance(cause, OSError) or _is_torch_file_error(cause) for cause in _causes(error)
    )


def _is_torch_file_error(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in STORAGE_SIGNS)


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop()
        if cause is None or any(cause is known for known in found):
            continue
        found.append(cause)
        waiting += [cause.__cause__, cause.__context__]
        # torch.distributed.checkpoint reports {rank: (exception, traceback summary)}.
        failures = getattr(cause, "failures", None)
        if isinstance(failures, dict):
            waiting += [pair[0] for pair in failures.values() if isinstance(pair, tuple)]
    return found


def _describe(error: BaseException) -> str:
    """The filesystem's own words where there are some, else the error's first line."""
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, OSError):
            return str(cause)
    # torch wraps what its file writer said in an exception that only counts ranks.
    error = next((cause for cause in causes if _is_torch_file_error(cause)), error)
    if _is_torch_file_error(error):
        return f"torch could not write or read a file ({str(error).splitlines()[0]})"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
