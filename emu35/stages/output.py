"""Writing what a stage hands to people: whole files and folders or none, and refusals that say
what to do."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from emu35.errors import DataError, ReleaseError
from emu35.files import sync_folder, write_atomically


def write_output(path: Path, *, content: bytes) -> None:
    """Write a whole file in place of whatever is at ``path``, or leave that as it was.

    Raises:
        DataError: naming the path, why it cannot be written, and the remedy.
    """
    try:
        write_atomically(path, content=content)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> DataError:
    """The error to raise where ``path`` cannot be written."""
    return DataError(
        f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
    )


def refuse_nonempty(out: Path) -> None:
    """Nothing of anybody's is written over.

    Raises:
        ReleaseError: ``out`` is a file or holds something.
    """
    if out.exists() and not out.is_dir():
        raise ReleaseError(f"{out} is a file; name a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        raise ReleaseError(f"{out} is not empty; name a folder that does not exist yet")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its name when the body succeeds.

    Raises:
        ReleaseError: the folder cannot be written, with the room there is.
    """
    temporary = out.absolute().with_name(f".tmp-{out.name}")
    try:
        # What a killed attempt left behind.
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out.absolute())
        sync_folder(temporary.parent)
    except OSError as error:
        free = _free_bytes(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        raise ReleaseError(
            f"cannot write {out}: {error}. {temporary.parent} had {free:,} bytes free; "
            "free some space or name another folder"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _free_bytes(path: Path) -> int:
    for place in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return 0
