"""What pictures there are: files of folders and members of tars, in one fixed order.

A listing may have a hundred million entries and every rank holds one, so it is kept as columns: the
name, and four numbers that say where the bytes of the picture and of its metadata lie. No picture
is read here.
"""

import json
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from stat import S_ISREG
from typing import overload

import numpy as np
from numpy.typing import NDArray

from emu35.errors import DataError
from emu35.vision.pictures.places import expand, refuse_repeats
from emu35.vision.pictures.tars import METADATA, NO_METADATA, Entry, read_entries

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
"""How compressed tars are called: no picture can be found in them by its offset."""

NO_TAR = -1
"""Offset of what is a file of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureFile:
    """Where the bytes of one picture lie, and those of its metadata, if ``metadata_size`` is not
    NO_METADATA.

    ``member`` is empty for a file of its own, whose metadata are in the file beside it.
    """

    path: Path
    member: str = ""
    offset: int = 0
    size: int = 0
    metadata_offset: int = 0
    metadata_size: int = NO_METADATA

    @property
    def name(self) -> str:
        """What messages call it: the path, and the member within a tar."""
        return f"{self.path}!{self.member}" if self.member else str(self.path)

    def read(self, limit: int | None = None) -> bytes:
        """The encoded bytes, or the first ``limit`` of them.

        Raises:
            OSError: the file cannot be read.
        """
        size = self.size if limit is None else min(limit, self.size)
        with self.path.open("rb") as file:
            if self.member:
                file.seek(self.offset)
                return file.read(size)
            # Without a limit all of it, although it may have grown since it was listed.
            return file.read() if limit is None else file.read(size)

    def read_metadata(self) -> Mapping[str, object]:
        """The JSON object that comes with the picture; empty where there is none.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds something else.
        """
        if self.metadata_size == NO_METADATA:
            return {}
        if self.member:
            with self.path.open("rb") as file:
                file.seek(self.metadata_offset)
                data = file.read(self.metadata_size)
        else:
            data = self.path.with_suffix(METADATA).read_bytes()
        found = json.loads(data)
        if not isinstance(found, dict):
            raise ValueError(f"a JSON object is expected, not {type(found).__name__}")
        return found


class Rejects:
    """Pictures that could not be used: name -> reason."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Columns:
    """A listing: entry i is called ``names[ends[i - 1]:ends[i]]`` within ``places[place[i]]``, a
    folder or (``offset`` >= 0) a tar."""

    places: Sequence[Path]
    names: bytes
    ends: NDArray[np.int64]
    place: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    metadata_offset: NDArray[np.int64]
    metadata_size: NDArray[np.int32]
    metadata_digest: str


class PictureFiles(Sequence[PictureFile]):
    """The pictures found, or a choice of them; an entry is made when it is asked for."""

    def __init__(self, columns: _Columns, *, rows: NDArray[np.int64]) -> None:
        self._columns = columns
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> PictureFile: ...
    @overload
    def __getitem__(self, index: slice) -> "PictureFiles": ...
    def __getitem__(self, index: int | slice) -> "PictureFile | PictureFiles":
        if isinstance(index, slice):
            return PictureFiles(self._columns, rows=self._rows[index])
        columns, row = self._columns, int(self._rows[index])
        first = int(columns.ends[row - 1]) if row else 0
        name = os.fsdecode(columns.names[first : int(columns.ends[row])])
        place, offset = columns.places[columns.place[row]], int(columns.offset[row])
        alone = offset == NO_TAR
        return PictureFile(
            path=place / name if alone else place,
            member="" if alone else name,
            offset=0 if alone else offset,
            size=int(columns.size[row]),
            metadata_offset=int(columns.metadata_offset[row]),
            metadata_size=int(columns.metadata_size[row]),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PictureFiles):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def choose(self, indices: NDArray[np.int64]) -> "PictureFiles":
        """Those of ``indices``, in their order; the columns are shared."""
        return PictureFiles(self._columns, rows=self._rows[indices])

    @property
    def metadata_digest(self) -> str:
        """Another one where metadata changed: a hash of where they lie, how long they are and when
        they were written. Of a choice it is still that of the whole listing."""
        return self._columns.metadata_digest

    @property
    def nbytes(self) -> int:
        """Memory that the listing takes, in bytes."""
        columns = self._columns
        numbers = (columns.ends, columns.place, columns.offset, columns.size)
        metadata = (columns.metadata_offset, columns.metadata_size, self._rows)
        return len(columns.names) + sum(part.nbytes for part in (*numbers, *metadata))


class _Listing:
    """Columns while they grow."""

    def __init__(self) -> None:
        self.places: list[Path] = []
        self._names = bytearray()
        self._ends = array("q")
        self._place = array("i")
        self._offset = array("q")
        self._size = array("q")
        self._metadata_offset = array("q")
        self._metadata_size = array("i")
        self._metadata = sha256()

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, entry: Entry, *, metadata_written: int) -> None:
        """A picture in the last of ``places``; its metadata were written at that time, in ns."""
        if entry.metadata_size != NO_METADATA:
            whose = (len(self), entry.metadata_offset, entry.metadata_size, metadata_written)
            self._metadata.update(f"{whose}\n".encode())
        # Names are bytes; those that are no UTF-8 reach Python as lone surrogates.
        self._names += os.fsencode(entry.name)
        self._ends.append(len(self._names))
        self._place.append(len(self.places) - 1)
        self._offset.append(entry.offset)
        self._size.append(entry.size)
        self._metadata_offset.append(entry.metadata_offset)
        self._metadata_size.append(entry.metadata_size)

    def done(self) -> PictureFiles:
        columns = _Columns(
            places=self.places,
            names=bytes(self._names),
            ends=np.array(self._ends, dtype=np.int64),
            place=np.array(self._place, dtype=np.int32),
            offset=np.array(self._offset, dtype=np.int64),
            size=np.array(self._size, dtype=np.int64),
            metadata_offset=np.array(self._metadata_offset, dtype=np.int64),
            metadata_size=np.array(self._metadata_size, dtype=np.int32),
            metadata_digest=self._metadata.hexdigest(),
        )
        return PictureFiles(columns, rows=np.arange(len(self), dtype=np.int64))


def find_pictures(paths: Sequence[str | Path], *, rejects: Rejects) -> PictureFiles:
    """Every picture under ``paths`` (folders, tars, picture files, patterns of these), by suffix,
    in a fixed order.

    Folders are searched to the bottom for pictures and tars alike; what is hidden there (its name
    begins with a dot) is left out. A tar that ends early gives what it holds. That tar, compressed
    ones and links that lead nowhere are named among ``rejects``.

    Raises:
        DataError: a path does not exist, has no picture, or lies within another; or a tar cannot
            be read.
    """
    listing = _Listing()
    entries = expand(paths)
    refuse_repeats([path for entry in entries for path in entry.matches])
    for entry in entries:
        before, found = len(listing), Rejects()
        for path in entry.matches:
            if path.is_dir():
                _add_folder(path, listing=listing, rejects=found)
            else:
                _add_file(path, beside=_names_of(path.parent), listing=listing, rejects=found)
        if len(listing) == before:
            raise _no_picture(entry.text, rejects=found)
        rejects.reasons.update(found.reasons)
    if not len(listing):
        raise _no_picture("an empty list of paths", rejects=Rejects())
    return listing.done()


def _no_picture(where: str, *, rejects: Rejects) -> DataError:
    found = "".join(f" ({name}: {why})" for name, why in list(rejects.reasons.items())[:1])
    return DataError(
        f"no picture in {where}{found}; expected files ending in {', '.join(sorted(SUFFIXES))}, "
        "or tars or folders of them: correct or remove it"
    )


def _add_folder(folder: Path, *, listing: _Listing, rejects: Rejects) -> None:
    """In the order of paths compared part by part. Links to folders are not followed, which could
    lead in circles; links to files are."""
    with os.scandir(folder) as entries:
        found = sorted(
            (entry.name, entry.is_dir(follow_symlinks=False))
            for entry in entries
            if not entry.name.startswith(".")
        )
    beside = frozenset(name for name, is_folder in found if not is_folder)
    for name, is_folder in found:
        if is_folder:
            _add_folder(folder / name, listing=listing, rejects=rejects)
        else:
            _add_file(folder / name, beside=beside, listing=listing, rejects=rejects)


def _add_file(path: Path, *, beside: frozenset[str], listing: _Listing, rejects: Rejects) -> None:
    suffix = path.suffix.lower()
    if path.name.lower().endswith(PACKED):
        rejects.reasons[str(path)] = "a compressed tar is not read; unpack it to a .tar"
    if suffix != ".tar" and suffix not in SUFFIXES:
        return
    try:
        status = path.stat()
    except OSError as error:
        rejects.reasons[str(path)] = f"cannot be found ({error.strerror or error})"
        return
    if not S_ISREG(status.st_mode):
        return
    if suffix == ".tar":
        listing.places.append(path)
        for entry in read_entries(path, suffixes=SUFFIXES, rejects=rejects.reasons):
            listing.add(entry, metadata_written=status.st_mtime_ns)
        return
    if not listing.places or listing.places[-1] != path.parent:
        listing.places.append(path.parent)
    size, written = _metadata_of(path, beside=beside)
    listing.add(
        Entry(name=path.name, offset=NO_TAR, size=status.st_size, metadata_size=size),
        metadata_written=written,
    )


def _metadata_of(path: Path, *, beside: frozenset[str]) -> tuple[int, int]:
    """Size in bytes and time of writing in ns of the metadata of the picture at ``path``."""
    metadata = path.with_suffix(METADATA)
    if metadata.name not in beside:
        return NO_METADATA, 0
    try:
        status = metadata.stat()
    except OSError:
        return 0, 0  # a link that leads nowhere; whoever wants to read it is told so
    return status.st_size, status.st_mtime_ns


def _names_of(folder: Path) -> frozenset[str]:
    return frozenset(os.listdir(folder))


def fingerprint(files: Sequence[PictureFile]) -> str:
    """Hash of the names within their paths and of the sizes: equal where the order is equal."""
    digest = sha256()
    for file in files:
        entry = f"{file.path.name}\0{file.member}\0{file.size}\n"
        # Names are bytes; those that are no UTF-8 reach Python as lone surrogates.
        digest.update(entry.encode(errors="surrogateescape"))
    return digest.hexdigest()
