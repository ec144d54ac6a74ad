"""Writing members into numbered tars: each complete, closed by its digest, or not there at all."""

import contextlib
import hashlib
import itertools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from emu35.data.shards import BLOCK, DIGEST_MEMBER, atomic_file, member_header
from emu35.errors import DataError

_SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def check_source_name(source: str) -> None:
    """Raises: DataError if a shard cannot be named after ``source``."""
    if not _SOURCE_NAME.fullmatch(source):
        raise DataError(
            f"source name {source!r} cannot name a shard; use letters, digits, '_', '-' and '.'"
        )


@dataclass(kw_only=True, slots=True)
class TarWriter:
    """Appends records to ``<stem>-NNNNNN.tar`` files of about ``shard_bytes`` each.

    A tar begins with the member ``opening`` (name and content) and appears under its name only when
    it is complete; ``finished`` is called with it then. Tars take the lowest numbers that are not
    in ``taken``. Used as a context manager, an exception discards the tar being written and keeps
    the complete ones, ``paths``.
    """

    folder: Path
    stem: str
    opening: tuple[str, bytes]
    shard_bytes: int
    taken: Collection[int] = ()
    finished: Callable[[Path], object] | None = None
    paths: list[Path] = field(default_factory=list[Path])
    _number: int = -1
    _records: int = 0
    _size: int = 0
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _file: BinaryIO | None = None
    _sha: Any = field(default_factory=hashlib.sha256)  # the library has no public name for its type

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def append(self, members: Mapping[str, bytes]) -> None:
        """Add one record: its members by extension, under a key of their own."""
        if self._file is None:
            self._begin()
        key = f"{self._number:06d}-{self._records:06d}"
        for extension, data in members.items():
            self._member(f"{key}.{extension}", data)
        self._records += 1
        if self._size >= self.shard_bytes:
            self._finish()

    def close(self) -> list[Path]:
        """Complete the tar being written; the paths of all that were written."""
        if self._file is not None:
            self._finish()
        return self.paths

    def abort(self) -> None:
        """Discard the tar being written."""
        self._open.__exit__(_Discard, _Discard(), None)
        self._file = None

    def _begin(self) -> None:
        self._number = next(n for n in itertools.count(self._number + 1) if n not in self.taken)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self._open.enter_context(atomic_file(self._path()))
        self._sha = hashlib.sha256()
        self._size = self._records = 0
        self._member(*self.opening)

    def _path(self) -> Path:
        return self.folder / f"{self.stem}-{self._number:06d}.tar"

    def _member(self, name: str, data: bytes) -> None:
        assert self._file is not None
        chunk = b"".join((member_header(name, len(data)), data, bytes(-len(data) % BLOCK)))
        try:
            self._file.write(chunk)
        except OSError as error:
            # Let the atomic file see it: it cleans up and names a full disk.
            self._open.__exit__(type(error), error, error.__traceback__)
            raise
        self._sha.update(chunk)
        self._size += len(chunk)

    def _finish(self) -> None:
        path = self._path()
        self._member(DIGEST_MEMBER, self._sha.hexdigest().encode())
        assert self._file is not None
        self._file.write(bytes(2 * BLOCK))
        self._file = None
        self._open.close()
        if self.finished is not None:
            self.finished(path)
        self.paths.append(path)


class _Discard(Exception):
    """Tells the atomic file that the tar is not wanted."""
