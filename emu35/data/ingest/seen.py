"""Which documents an ingestion holds already, by hash: a SQLite book beside the manifest.

The hashes of an input are committed just before the manifest names it as done, so a kill between
the two leaves hashes of an input that is not done; they are removed when the book is opened. A
replacement begins a book of its own, which the manifest names once the first new shards are in
place; until then the earlier book stays as it was.

A repeated document is left out of the input that comes later. Should the earlier input be lost
afterwards and fail when it is done again, the document is in no shard: ``rejects.jsonl`` names
both, and ``--replace`` brings it back.
"""

import contextlib
import os
import sqlite3
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

from emu35.data.ingest.manifest import Manifest
from emu35.errors import DataError

_CACHE_KIB = 256 * 1024
_TABLES = """
    CREATE TABLE IF NOT EXISTS inputs (number INTEGER PRIMARY KEY, path BLOB UNIQUE NOT NULL);
    CREATE TABLE IF NOT EXISTS seen (
        hash BLOB PRIMARY KEY, input INTEGER NOT NULL, id BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS seen_input ON seen (input);
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class First:
    """The document that a duplicate repeats."""

    input: str
    id: str


@dataclass(kw_only=True, slots=True)
class Seen:
    """An open book. Hashes added since :meth:`begin` are in it for good after :meth:`commit`."""

    book: sqlite3.Connection
    input: int = field(default=0)

    def begin(self, path: Path) -> None:
        """Start with the documents of the input ``path``."""
        self.book.rollback()
        name = os.fsencode(path)
        self.book.execute("INSERT OR IGNORE INTO inputs (path) VALUES (?)", (name,))
        (row,) = self.book.execute("SELECT number FROM inputs WHERE path = ?", (name,))
        self.input = row[0]

    def add(self, hash: bytes, *, id: str) -> First | None:
        """Note a document; what it repeats, if it was there already."""
        values = (hash, self.input, id.encode(errors="surrogatepass"))
        if self.book.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", values).rowcount:
            return None
        (row,) = self.book.execute(
            "SELECT path, id FROM seen JOIN inputs ON number = input WHERE hash = ?", (hash,)
        )
        return First(input=os.fsdecode(row[0]), id=row[1].decode(errors="surrogatepass"))

    def commit(self) -> None:
        """Keep what was added."""
        self.book.commit()

    def rollback(self) -> None:
        """Forget what was added since :meth:`begin`."""
        self.book.rollback()


@contextlib.contextmanager
def open_seen(manifest: Manifest) -> Generator[Seen, None, None]:
    """The book of ``manifest``, begun if there is none, without hashes of inputs that are not done.

    Raises:
        DataError: if the book is damaged, or gone while documents are there.
    """
    if manifest.retired or not manifest.seen:
        # The manifest on disk may still name the earlier one.
        numbers = (int(path.stem.partition("-")[2]) for path in _books(manifest))
        manifest.seen = f"seen-{max(numbers, default=-1) + 1}.sqlite"
    elif manifest.done and not (manifest.books / manifest.seen).is_file():
        raise DataError(
            f"{manifest.books / manifest.seen} is gone, so that duplicates of what is there cannot "
            "be found; restore it, or start over with --replace"
        )
    path = manifest.books / manifest.seen
    try:
        book = sqlite3.connect(path)
        with contextlib.closing(book):
            book.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            book.executescript(_TABLES)
            _forget_undone(book, manifest=manifest)
            if not manifest.done and not manifest.retired:
                manifest.save()
            yield Seen(book=book)
    except sqlite3.DatabaseError as error:
        raise DataError(
            f"{path} cannot be used ({error}); free some space if the disk is full, else start "
            "over with --replace"
        ) from error
    for other in _books(manifest):
        # While a replacement has replaced nothing, the manifest on disk names the earlier book.
        if other.name != manifest.seen and not manifest.retired:
            other.unlink()


def _forget_undone(book: sqlite3.Connection, *, manifest: Manifest) -> None:
    done = {os.fsencode(entry.path) for entry in manifest.done}
    for number, path in book.execute("SELECT number, path FROM inputs").fetchall():
        if path not in done:
            book.execute("DELETE FROM seen WHERE input = ?", (number,))
    book.commit()


def _books(manifest: Manifest) -> list[Path]:
    return sorted(manifest.books.glob("seen-*.sqlite"))
