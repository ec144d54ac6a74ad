"""What an output folder already holds: the ``.ingest`` folder beside the shards.

``manifest.json`` names the options, and every input that is done with its shards and counts;
``rejects/NNNNNN.jsonl`` holds the rejects of one input; ``staging/`` the shards of the input being
worked on; ``lock`` keeps two runs out of one folder.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emu35.data.index import index_path
from emu35.data.ingest.options import Existing
from emu35.data.readers.discover import InputFile
from emu35.data.shards import atomic_file, sync_folder
from emu35.errors import DataError

_BOOKS = ".ingest"
_FORMAT = 1


@dataclass(kw_only=True, slots=True)
class DoneInput:
    """An input whose shards are in place. ``shards`` are paths relative to the output folder."""

    path: str
    fingerprint: str
    shards: list[str]
    documents: int
    tokens: int
    visual_tokens: int
    rejects: dict[str, int]


@dataclass(kw_only=True, slots=True)
class Manifest:
    """The books of one output folder.

    ``folders`` are the shard folders relative to ``out``: ``["."]``, or one for each order.
    """

    out: Path
    folders: list[str]
    identity: dict[str, Any]
    done: list[DoneInput] = field(default_factory=list[DoneInput])

    @property
    def books(self) -> Path:
        return self.out / _BOOKS

    @property
    def staging(self) -> Path:
        return self.books / "staging"

    def next_shard(self, folder: str) -> int:
        """Number of the next shard in ``folder``."""
        prefix = "" if folder == "." else f"{folder}/"
        return sum(
            "/" not in shard.removeprefix(prefix)
            for entry in self.done
            for shard in entry.shards
            if shard.startswith(prefix)
        )

    def find(self, source: InputFile) -> DoneInput | None:
        """The entry of an input that is done.

        Raises:
            DataError: if the input changed since.
        """
        for entry in self.done:
            if entry.path == str(source.path):
                if entry.fingerprint != source.fingerprint:
                    raise DataError(
                        f"input {source.path} changed since it was ingested into {self.out}; "
                        "ingest into another folder, or use --replace to start over"
                    )
                return entry
        return None

    def clear_staging(self) -> None:
        """Forget whatever an interrupted run left unfinished."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def commit(self, entry: DoneInput) -> None:
        """Move the staged shards of an input into place, then name it as done.

        An interruption in between leaves shards that the manifest does not know; :func:`open_books`
        removes those and the input is done again.
        """
        for name in entry.shards:
            staged, final = self.staging / name, self.out / name
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, final)
            os.replace(index_path(staged), index_path(final))
        for folder in self.folders:
            if (self.out / folder).is_dir():
                sync_folder(self.out / folder)
        self.done.append(entry)
        self.save()
        self.clear_staging()

    def save(self) -> None:
        body = {
            "format": _FORMAT,
            "identity": self.identity,
            "done": [asdict(entry) for entry in self.done],
        }
        with atomic_file(self.books / "manifest.json") as file:
            file.write(json.dumps(body, indent=1).encode())


def open_books(
    *, out: Path, folders: Sequence[str], identity: dict[str, Any], existing: Existing
) -> Manifest:
    """Read the books of ``out``, or begin new ones; remove what no finished input accounts for.

    Raises:
        DataError: if the folder holds shards of unknown origin, or was ingested with other options.
    """
    manifest = Manifest(out=out, folders=list(folders), identity=identity)
    path = manifest.books / "manifest.json"
    if existing is Existing.replace and path.is_file():
        _remove_shards(_read(path)["done"], out=out)
        path.unlink()
    if path.is_file():
        body = _read(path)
        changes = [
            f"{name} was {body['identity'].get(name)} and is {value}"
            for name, value in identity.items()
            # Options may change as long as nothing was made with them.
            if body["done"] and body["identity"].get(name) != value
        ]
        if changes:
            raise DataError(
                f"{out} was ingested with other options: " + "; ".join(changes) + ". "
                "Use them again, choose another folder, or start over with --replace"
            )
        manifest.done = [DoneInput(**entry) for entry in body["done"]]
        _remove_strays(manifest)
    else:
        strays = [path for folder in folders for path in _shards(out / folder)]
        if strays:
            raise DataError(
                f"{out} already holds shards ({strays[0].name}) but no record of how they were "
                "made; choose an empty folder"
            )
        manifest.books.mkdir(parents=True, exist_ok=True)
        manifest.save()
    manifest.clear_staging()
    for folder in (out, manifest.books, manifest.books / "rejects"):
        for temporary in folder.glob(".*.jsonl.*.tmp"):
            temporary.unlink()
    return manifest


@contextlib.contextmanager
def lock_folder(out: Path) -> Generator[None, None, None]:
    """Hold ``out`` for one ingestion.

    Raises:
        DataError: if another process holds it.
    """
    books = out / _BOOKS
    books.mkdir(parents=True, exist_ok=True)
    with (books / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"another ingestion is writing to {out}; wait for it or choose another folder"
            ) from error
        yield


def _read(path: Path) -> dict[str, Any]:
    try:
        body: dict[str, Any] = json.loads(path.read_text())
        if body["format"] != _FORMAT:
            raise ValueError(f"format {body['format']}")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a readable ingestion manifest ({error}); choose another folder"
        ) from error
    return body


def _shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in (".tar", ".idx"))


def _remove_shards(done: Sequence[dict[str, Any]], *, out: Path) -> None:
    for entry in done:
        for name in entry["shards"]:
            (out / name).unlink(missing_ok=True)
            index_path(out / name).unlink(missing_ok=True)


def _remove_strays(manifest: Manifest) -> None:
    """Remove shards that were moved into place but never named as done."""
    known = {manifest.out / name for entry in manifest.done for name in entry.shards}
    known |= {index_path(path) for path in known}
    source = manifest.identity["source"]
    for folder in manifest.folders:
        for path in _shards(manifest.out / folder):
            # Anything under another name is the user's own business.
            if path not in known and path.name.startswith(f"{source}-"):
                path.unlink()
