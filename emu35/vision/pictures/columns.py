"""Numbers about pictures, kept on disk: a column for each score, in parts of ``PART`` pictures.

A column is known by :func:`key_of` of the whole listing and by what its numbers depend on, so
neither other pictures nor another model find it. Parts are written whole or not at all; a run that
was ended while it scored goes on at the first part that lacks something. Pictures that could not be
read are not kept: whoever comes next looks at them again, as they may have been mended. Only the
run itself must go on with what it began with, and remembers them (:mod:`.unread`).
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emu35.errors import DataError
from emu35.files import atomic_file
from emu35.vision.pictures.files import PictureFile

PROBES = 32

_LAYOUT = 2
"""Of the files; columns of another one are not found."""

PART = 4096
"""Pictures of a part: what is lost at most when scoring is interrupted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A score: its name, and what its numbers depend on."""

    name: str
    identity: str


@dataclass(kw_only=True, slots=True)
class Part:
    """Up to PART numbers of a column. ``value`` is NaN where ``known`` but there is none; where
    that is because something could not be read, ``reasons`` says what, by place."""

    value: NDArray[np.float64]
    known: NDArray[np.bool_]
    reasons: dict[int, str] = field(default_factory=dict[int, str])


def empty_part(count: int) -> Part:
    """Nothing known of ``count`` pictures."""
    return Part(value=np.full(count, np.nan), known=np.zeros(count, dtype=bool))


def key_of(files: Sequence[PictureFile], *, fingerprint: str) -> str:
    """What tells a listing from others that share a folder of columns: its ``fingerprint``, and the
    bytes of PROBES of its pictures. Names and sizes alone may be those of another listing, where
    pictures are numbered and their format compresses nothing."""
    digest = sha256(f"{_LAYOUT} {fingerprint}".encode())
    for index in np.linspace(0, len(files) - 1, num=min(PROBES, len(files))).astype(int).tolist():
        try:
            digest.update(sha256(files[index].read()).digest())
        except OSError:
            digest.update(b"unreadable")
    return digest.hexdigest()[:16]


class ColumnFolder:
    """Columns of one listing, in ``folder / key``."""

    def __init__(self, folder: Path, *, key: str) -> None:
        self._folder = folder / key

    def read(self, column: Column, *, part: int, count: int) -> Part:
        """Part number ``part``, of ``count`` pictures; an empty one if it was not written yet.

        Raises:
            DataError: the file is damaged.
        """
        path = self._path(column, part)
        if not path.exists():
            return empty_part(count)
        try:
            with np.load(path, allow_pickle=False) as found:
                whose = found["whose"].tolist()
                read = Part(value=found["value"], known=found["known"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path} cannot be read ({error}); delete it and its pictures are scored again"
            ) from error
        if whose != column.identity or read.value.shape != (count,) or read.known.shape != (count,):
            raise DataError(
                f"{path} holds other scores than it should; delete it and its pictures are scored "
                "again"
            )
        return read

    def write(self, column: Column, found: Part, *, part: int) -> None:
        """Keep part number ``part``, without the places that have ``reasons``.

        Raises:
            DataError: it cannot be written.
        """
        known = found.known.copy()
        known[np.array(list(found.reasons), dtype=np.int64)] = False
        path = self._path(column, part)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                np.savez(
                    file,
                    whose=np.array(column.identity),
                    value=found.value,
                    known=known,
                )
        except OSError as error:
            raise DataError(
                f"cannot write {path}: {error.strerror or error}; free some space, or name another "
                "folder as data.score_cache"
            ) from error

    def _path(self, column: Column, part: int) -> Path:
        digest = sha256(column.identity.encode(errors="surrogateescape")).hexdigest()
        readable = "".join(c if c.isalnum() or c in "_-" else "_" for c in column.name)
        return self._folder / f"{readable[:40]}-{digest[:12]}" / f"{part:06d}.npz"
