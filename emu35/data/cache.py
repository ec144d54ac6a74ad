"""Local copies of remote shards: bounded, shared by all processes of a host, never stale.

A copy is named after the URL and the digest that the index gives for the tar, so that a shard
written again under its old name is another copy. One process brings a copy, under a temporary name
and holding a lock, while the others that want it wait. Before it begins, it makes room: the copies
that were used least recently go, until all of them and what is on its way fit the bound. Removing
one that somebody has mapped takes its name alone; the map stays whole.

Copies are checked whenever they are opened (size and closing digest) and every document when it is
read, so that nothing need be synced to disk: after a crash, a bad copy is brought again.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from emu35.config.data import CacheConfig
from emu35.data.shards import read_tail, tail_digest
from emu35.errors import DataError
from emu35.tokens.table import cache_folder

Fetch = Callable[[Path], None]
"""Brings a tar to a path. Raises: DataError if it cannot."""

_COPY = re.compile(r".*-[0-9a-f]{24}\.tar")
_COMING = re.compile(r"\.(?P<copy>.*-[0-9a-f]{24}\.tar)\.(?P<bytes>\d+)\.tmp")
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 3600


class Unreachable(DataError):
    """A shard or its folder could not be read for now; whether it is damaged is not known."""


class ShardCache:
    """The copies in one folder, at most ``config.bytes`` of them."""

    def __init__(self, config: CacheConfig) -> None:
        chosen = config.folder
        self.folder = Path(chosen).expanduser() if chosen else cache_folder() / "shards"
        self.bytes = config.bytes

    def path(self, *, url: str, digest: str) -> Path:
        """Where the copy of a shard is, or would be."""
        key = hashlib.sha256(f"{url}\n{digest}".encode()).hexdigest()[:24]
        stem = url.rsplit("/", 1)[-1].removesuffix(".tar")[:80]
        return self.folder / f"{stem}-{key}.tar"

    def open(self, *, url: str, digest: str, size: int, fetch: Fetch) -> BinaryIO:
        """The copy of a shard, brought by ``fetch`` where there is none that is as it should be.

        Raises:
            DataError: what is at ``url`` is another shard; it is brought twice before that is
                believed.
            Unreachable: it is larger than the bound, or the folder cannot be written.
        """
        path = self.path(url=url, digest=digest)
        with self._errors():
            if (file := _open_checked(path, size=size, digest=digest)) is not None:
                return file
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(_lock_path(path)):
                # Somebody else may have brought it while this process waited.
                if (file := _open_checked(path, size=size, digest=digest)) is not None:
                    return file
                path.unlink(missing_ok=True)
                for _ in range(2):
                    file = self._bring(path, size=size, url=url, digest=digest, fetch=fetch)
                    if file is not None:
                        return file
        raise DataError(
            f"shard {url} is not the one its index was made for (its size or closing digest "
            "differ); restore it, or build its index again"
        )

    def forget(self, *, url: str, digest: str, seen: int) -> None:
        """Drop a copy that is not as it should be, unless another than inode ``seen`` is there."""
        path = self.path(url=url, digest=digest)
        with self._errors(), _locked(_lock_path(path)), contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == seen:
                path.unlink()

    def touch(self, *, url: str, digest: str) -> None:
        """Tell that a copy is in use, so that others are removed first."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path(url=url, digest=digest))

    def _bring(
        self, path: Path, *, size: int, url: str, digest: str, fetch: Fetch
    ) -> BinaryIO | None:
        """The copy, opened; None, and no copy is left, if it is another shard."""
        temporary = path.with_name(f".{path.name}.{size}.tmp")
        if size > self.bytes:
            raise Unreachable(
                f"shard {url} has {size} bytes, more than data.cache.bytes={self.bytes}; raise the "
                "bound, or write smaller shards (emu35 data ingest --shard-bytes)"
            )
        try:
            self._reserve(temporary, size=size)
            fetch(temporary)
            # Opened before it has its name: from then on others may remove it to make room.
            if (file := _open_checked(temporary, size=size, digest=digest)) is not None:
                os.replace(temporary, path)
            return file
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, temporary: Path, *, size: int) -> None:
        """Make room and take it by creating ``temporary``, whose name says how much."""
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while True:
            with _locked(self.folder / ".room.lock", keep=True):
                if self._make_room(size, own=temporary):
                    temporary.touch()
                    return
            # All the room is for what other processes are bringing, which can go when it is there.
            if time.monotonic() > give_up:
                raise Unreachable(
                    f"the shard cache {self.folder} is full of downloads that do not end; raise "
                    f"data.cache.bytes={self.bytes}"
                )
            time.sleep(_POLL_SECONDS)

    def _make_room(self, size: int, *, own: Path) -> bool:
        """Whether ``size`` bytes are free below the bound, after removing what may go."""
        copies: list[tuple[int, int, Path]] = []
        used = size
        for path in self.folder.iterdir():
            if coming := _COMING.fullmatch(path.name):
                if path != own and not _abandoned(path, copy=self.folder / coming["copy"]):
                    used += int(coming["bytes"])
            elif _COPY.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):
                    facts = path.stat()
                    copies.append((facts.st_mtime_ns, facts.st_size, path))
                    used += facts.st_size
        for _, bytes_of_copy, path in sorted(copies):
            if used <= self.bytes:
                break
            path.unlink(missing_ok=True)
            used -= bytes_of_copy
        return used <= self.bytes

    @contextmanager
    def _errors(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "free some space or lower data.cache.bytes" if full else "check the folder"
            raise Unreachable(
                f"shard cache {self.folder}: {error.strerror or error}; {remedy}, or name another "
                "folder with data.cache.folder"
            ) from error


def _open_checked(path: Path, *, size: int, digest: str) -> BinaryIO | None:
    """The file at ``path`` if it is the shard that is wanted; opening it counts as its use."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size == size and tail_digest(read_tail(file)) == digest:
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
        return file
    file.close()
    return None


def _lock_path(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.lock")


def _abandoned(temporary: Path, *, copy: Path) -> bool:
    """Remove what a process that is gone was bringing; whether it was so."""
    lock = _lock(_lock_path(copy), wait=False)
    if lock is None:
        return False
    try:
        temporary.unlink(missing_ok=True)
    finally:
        _unlock(lock, _lock_path(copy))
    return True


@contextmanager
def _locked(path: Path, *, keep: bool = False) -> Generator[None, None, None]:
    lock = _lock(path, wait=True)
    assert lock is not None
    try:
        yield
    finally:
        if keep:
            os.close(lock)
        else:
            _unlock(lock, path)


def _lock(path: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the lock, None if another has it and this is not to ``wait``."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(lock)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(lock).st_ino:
                return lock
        # Whoever had it before has removed the file: another one is the lock by now.
        os.close(lock)


def _unlock(lock: int, path: Path) -> None:
    path.unlink(missing_ok=True)
    os.close(lock)
