"""Writing what a stage hands to people: whole files or none, and refusals that say what to do."""

from pathlib import Path

from emu35.checkpoint.durable import write_atomically
from emu35.errors import DataError


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
