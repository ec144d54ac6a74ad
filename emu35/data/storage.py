"""A folder of shards, on this file system or behind a URL, seen in one way.

Local shards are mapped where they lie. Behind a URL (whatever fsspec opens: ``s3://``, ``gs://``,
``http://``), indices are read whole at the start, a tar is checked by its size and its last bytes,
and comes into the cache (:mod:`emu35.data.cache`) when its first document is read. Credentials
and endpoints are those that fsspec finds: the environment, and its own configuration files.

A read that fails is tried again a few times with growing pauses. What then still cannot be reached
is :class:`Unreachable`, which is not damage: it says nothing about the shard, and ranks that left
out what they could not reach would train on different data.
"""

import errno
import stat
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from emu35.config.data import CacheConfig
from emu35.data.cache import ShardCache, Unreachable
from emu35.data.place import Place, Url
from emu35.data.shards import TAIL, read_tail
from emu35.errors import DataError

T = TypeVar("T")
Message = Callable[[str], None]
"""Tells the person who started the run something."""

TRIES = 5
FIRST_PAUSE = 0.5
"""Seconds before the second try; every later pause is twice as long."""

_EXTRAS = {
    "http": "http",
    "https": "http",
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}
_HTTP = ("http", "https")
_SILENCE_SECONDS = 60
_LATER = (408, 425, 429)
"""HTTP answers below 500 that ask to come again."""


class ShardFolder(Protocol):
    """Where the shards of a source lie.

    Attributes:
        place: the folder.
        readers: how many files are worth reading at once.
        rebuild: what to do about an index that is lost or wrong, for the end of a message.
    """

    place: Place
    readers: int
    rebuild: str

    def names(self) -> list[str]:
        """Every name in the folder, in no order. Raises: DataError if there is no such folder."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is none.

        Raises:
            DataError: it is no regular file, or cannot be asked for.
        """
        ...

    def content(self, name: str) -> bytes:
        """A whole file. Raises: DataError if it cannot be read."""
        ...

    def tail(self, name: str, *, size: int) -> bytes:
        """The last :data:`~emu35.data.shards.TAIL` bytes of a file of ``size`` bytes.

        Raises:
            DataError: it cannot be read.
        """
        ...

    def open(self, name: str, *, size: int, digest: str) -> BinaryIO:
        """A tar, to be mapped; ``size`` and closing ``digest`` are what its index says.

        Raises:
            DataError: it cannot be read, or is not that tar.
        """
        ...


def open_folder(
    place: Place, *, cache: CacheConfig | None = None, message: Message | None = None
) -> "LocalFolder | RemoteFolder":
    """The folder ``place``; ``message`` hears of reads that are tried again.

    Raises:
        DataError: nothing that is installed opens such a URL.
    """
    if isinstance(place, Path):
        return LocalFolder(place)
    return RemoteFolder(place, cache=ShardCache(cache or CacheConfig()), message=message)


class LocalFolder:
    """A folder of this file system."""

    readers = 1

    def __init__(self, place: Path) -> None:
        self.place: Place = place
        self._path = place
        self.rebuild = f"run `emu35 data index {place}` to rebuild it"

    def names(self) -> list[str]:
        if not self._path.is_dir():
            raise DataError(
                f"shard folder {self._path} does not exist; write it with `emu35 data ingest`"
            )
        with _file_errors(self._path):
            return [path.name for path in self._path.iterdir()]

    def size(self, name: str) -> int | None:
        path = self._path / name
        with _file_errors(path):
            try:
                facts = path.stat()
            except FileNotFoundError:
                return None
        # Reading a pipe or a device would not end.
        if not stat.S_ISREG(facts.st_mode):
            raise DataError(f"{path} is no regular file; restore the shard and its index")
        return facts.st_size

    def content(self, name: str) -> bytes:
        with _file_errors(self._path / name):
            return (self._path / name).read_bytes()

    def tail(self, name: str, *, size: int) -> bytes:
        del size
        with _file_errors(self._path / name), (self._path / name).open("rb") as file:
            return read_tail(file)

    def open(self, name: str, *, size: int, digest: str) -> BinaryIO:
        del size, digest
        with _file_errors(self._path / name):
            return (self._path / name).open("rb")


@contextmanager
def _file_errors(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; restore it") from error


class RemoteFolder:
    """A folder behind a URL.

    Attributes:
        retried: reads that failed and were tried again, so far.
    """

    readers = 16

    def __init__(self, place: Url, *, cache: ShardCache, message: Message | None = None) -> None:
        """Raises: DataError if nothing that is installed opens such a URL."""
        self.place: Place = place
        self._scheme = place.scheme
        self.rebuild = (
            "rebuild it with `emu35 data index` where the shards were written, and upload it"
        )
        self.retried = 0
        self._files, self._root = _file_system(place)
        self._cache = cache
        self._message = message
        self._sizes: dict[str, int] = {}
        self._folders: set[str] = set()

    def names(self) -> list[str]:
        self._sizes.clear()
        self._folders.clear()

        def listing() -> list[dict[str, Any]]:
            return self._files.ls(self._root, detail=True)

        found = self._read(listing, what=f"the list of {self.place}")
        if found is None:
            raise DataError(
                f"shard folder {self.place} does not exist or cannot be listed; upload shards "
                "there, or let the server list the folder"
            )
        names: list[str] = []
        for entry in found:
            name = str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
            names.append(name)
            if entry.get("type") == "directory":
                self._folders.add(name)
            elif isinstance(entry.get("size"), int):
                self._sizes[name] = entry["size"]
        return names

    def size(self, name: str) -> int | None:
        if name in self._folders:
            raise DataError(f"{self._url(name)} is a folder; restore the shard and its index")
        if name not in self._sizes:
            facts = self._read(lambda: self._files.info(self._path(name)), what=self._url(name))
            if facts is None:
                return None
            size = facts.get("size")
            if not isinstance(size, int):
                raise Unreachable(
                    f"{self._url(name)}: the server does not say how large the file is; shards "
                    "need a server that does"
                )
            self._sizes[name] = size
        return self._sizes[name]

    def content(self, name: str) -> bytes:
        return self._bytes(name, start=None, end=None)

    def tail(self, name: str, *, size: int) -> bytes:
        # A server without ranges answers with everything.
        return self._bytes(name, start=max(0, size - TAIL), end=size)[-TAIL:]

    def open(self, name: str, *, size: int, digest: str) -> BinaryIO:
        def fetch(target: Path) -> None:
            path, what = self._path(name), self._url(name)
            done = self._read(lambda: (self._files.get_file(path, str(target)), True)[1], what=what)
            if done is None:
                raise DataError(f"shard {what} is not there any more; restore it")

        return self._cache.open(url=self._url(name), digest=digest, size=size, fetch=fetch)

    def renew(self, name: str, *, size: int, digest: str, seen: int) -> BinaryIO:
        """:meth:`open` another copy than that with the inode ``seen``."""
        self._cache.forget(url=self._url(name), digest=digest, seen=seen)
        return self.open(name, size=size, digest=digest)

    def gone(self, name: str, *, digest: str) -> bool:
        """Whether the cache has removed a copy, so that mapping it holds its space."""
        return not self._cache.path(url=self._url(name), digest=digest).exists()

    def touch(self, name: str, *, digest: str) -> None:
        """Tell the cache that a copy is in use."""
        self._cache.touch(url=self._url(name), digest=digest)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _url(self, name: str) -> str:
        return f"{self.place}/{name}"

    def _bytes(self, name: str, *, start: int | None, end: int | None) -> bytes:
        path = self._path(name)
        found = self._read(
            lambda: self._files.cat_file(path, start=start, end=end), what=self._url(name)
        )
        if found is None:
            raise DataError(f"{self._url(name)} is not there any more; restore it")
        return found

    def _read(self, action: Callable[[], T], *, what: str) -> T | None:
        """What ``action`` gives, tried again while it fails for a reason that may pass; None for
        what does not exist.

        Raises:
            Unreachable: it kept failing, or failed for good.
            OSError: the disk here is full.
        """
        for number in range(1, TRIES + 1):
            try:
                return action()
            # File systems raise what their libraries raise; nothing is swallowed here.
            except Exception as error:
                cause = _cause(error, scheme=self._scheme)
                if _is_missing(cause):
                    return None
                if _is_full(cause):
                    raise
                if not _may_pass(cause):
                    raise Unreachable(
                        f"cannot read {what}: {_words(cause)}; check the URL and the credentials"
                    ) from error
                if number == TRIES:
                    raise Unreachable(
                        f"cannot read {what}: failed {TRIES} times, the last time with "
                        f"{_words(cause)}; check the network and the server, then run the same "
                        "command again"
                    ) from error
                pause = FIRST_PAUSE * 2 ** (number - 1)
                self.retried += 1
                if self._message is not None:
                    self._message(
                        f"{what}: try {number} of {TRIES} failed ({_words(cause)}); the next in "
                        f"{pause:g} s"
                    )
                time.sleep(pause)
        raise AssertionError("unreachable")


def _file_system(place: Url) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    fsspec: Any = import_module("fsspec.core")
    # A listing or a connection from before may be out of date.
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        if place.scheme in _HTTP:
            options["client_kwargs"] = _http_options()
        files, root = fsspec.url_to_fs(str(place), **options)
    except ImportError as error:
        extra = _EXTRAS.get(place.scheme)
        remedy = f'pip install "emu35[{extra}]"' if extra else "install what it names"
        raise DataError(f"{place}: {error}; {remedy}") from error
    except ValueError as error:
        raise DataError(
            f"{place}: {error}; use a local path, or a URL such as s3://, gs:// or http://"
        ) from error
    return files, str(root)


def _http_options() -> dict[str, Any]:
    aiohttp: Any = import_module("aiohttp")
    # By default five minutes for everything, which a large shard may need; here only silence ends.
    return {
        "timeout": aiohttp.ClientTimeout(
            total=None, sock_connect=_SILENCE_SECONDS, sock_read=_SILENCE_SECONDS
        )
    }


def _cause(error: Exception, *, scheme: str) -> BaseException:
    """fsspec's http says FileNotFoundError for all that goes wrong when it asks for a size. Object
    stores say it of what is not there, and name an error of their library as the cause."""
    if (
        scheme in _HTTP
        and isinstance(error, FileNotFoundError)
        and isinstance(error.__cause__, BaseException)
    ):
        return error.__cause__
    return error


def _is_missing(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (404, 410)


def _is_full(error: BaseException) -> bool:
    """Whether it is about the disk here, of which the cache has more to say."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _may_pass(error: BaseException) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status >= 500 or status in _LATER
    # What is wrong with the request stays wrong.
    files = PermissionError | IsADirectoryError | NotADirectoryError
    return not isinstance(error, files | DataError | ImportError | ValueError | TypeError)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
