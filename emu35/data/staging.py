"""A folder that is there whole, or not at all."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from emu35.errors import DataError
from emu35.files import sync_folder


@contextlib.contextmanager
def whole_folder(out: Path) -> Generator[Path, None, None]:
    """A folder for the body to fill; it becomes ``out`` when the body succeeds and vanishes when it
    fails. What a killed process left behind is removed by the next one.

    Until then it lies in ``.NAME.part`` beside ``out``, which may be an empty folder already.

    Raises:
        DataError: if another process is writing ``out``, or something came to be there meanwhile.
    """
    out = out.resolve()
    beside = out.with_name(f".{out.name}.part")
    beside.mkdir(parents=True, exist_ok=True)
    staging = beside / "folder"
    with _lock(beside / "lock", out=out):
        try:
            refuse_filled(out)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            yield staging
            sync_folder(staging)
            _put(staging, out=out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            (beside / "lock").unlink()
            # Another process may be about to lock it.
            with contextlib.suppress(OSError):
                beside.rmdir()


def refuse_filled(out: Path) -> None:
    """Raises: DataError if ``out`` is there and is not an empty folder."""
    if not out.exists():
        return
    first = min((path.name for path in out.iterdir()), default=None) if out.is_dir() else out.name
    if first is not None:
        raise DataError(
            f"{out} is not an empty folder (there is {first}); name another with --out, or move "
            "what is there"
        )


def _put(staging: Path, *, out: Path) -> None:
    try:
        os.rename(staging, out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            refuse_filled(out)
        raise
    sync_folder(out.parent)


@contextlib.contextmanager
def _lock(path: Path, *, out: Path) -> Generator[None, None, None]:
    with path.open("w") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        # One that finished in between took its lock file along.
        if (
            not held
            or not path.exists()
            or not os.path.samestat(path.stat(), os.fstat(file.fileno()))
        ):
            raise DataError(
                f"another process is writing {out}; wait for it, or name another folder"
            )
        yield
