"""Files that are there whole and durable, or not at all.

``fsync`` on a file makes its bytes durable, ``fsync`` on a folder makes its names durable; a rename
is atomic for whoever looks, but only durable once the folder that holds it was synced.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, for a file that the body writes; it becomes ``path`` when
    the body succeeds and vanishes, ``path`` left as it was, when it fails.

    Raises:
        OSError: as the file system gives it.
    """
    # Unlike for any other writer, so that two of the same file do not meet.
    writer = f"{os.getpid()}-{threading.get_native_id()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """:func:`replacing`, with the temporary file open for writing."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file


def write_atomically(path: Path, *, content: bytes) -> None:
    """Write a whole file in place of whatever is at ``path``."""
    with atomic_file(path) as file:
        file.write(content)


def sync_folder(path: Path) -> None:
    """Make the names inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
