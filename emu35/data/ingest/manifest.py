"""What an output folder already holds: the ``.ingest`` folder beside the shards.

``manifest.json`` names the options, every input that is done with its shards and counts, and the
shards that are coming or going; ``rejects/`` holds a file of rejects for each input; ``staging/``
the shards of the input being worked on, ``encoded/`` what workers have read and encoded ahead of
it; ``seen-0.sqlite`` the hashes of documents; ``lock`` keeps two runs out of one folder.

A folder can also be filled in parts, each by a job of its own: part ``1-of-4`` keeps its books in
``.ingest-1-of-4`` and writes shards ``SOURCE-1-of-4-000000.tar``, and none touches another's.

The manifest is written before shards are put in place or removed, and names them as unsettled, not
as done. A run that finds unsettled shards removes whatever is left of them; any other shard that
the manifest does not know is someone else's, and is never touched.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from emu35.data.ingest.options import Existing
from emu35.data.ingest.shard_kind import TOKEN_SHARDS, ShardKind
from emu35.data.shards import atomic_file
from emu35.errors import DataError
from emu35.files import sync_folder

_BOOKS = ".ingest"
_FORMAT = 1
_UNNAMED = {"dedup": "none", "clips": None, "pictures": None}
_LATER_OPTIONS = {"starts": "random", "layout": None, **_UNNAMED}
"""Options that books of an earlier version do not name, with what they come to. Those that are
unnamed are no part of the names of notes either, so that notes of earlier versions are found."""
# How many files a message names before it counts the rest.
_NAMED = 6


class Unit(Protocol):
    """What is committed as a whole: an input file, or a stretch of one. ``path`` names it among
    its like, ``fingerprint`` changes with its content."""

    @property
    def path(self) -> Path: ...

    @property
    def fingerprint(self) -> str: ...


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

    Attributes:
        folders: shard folders relative to ``out``: ``["."]``, or one for each order.
        unsettled: shards that may be in place and are not done: about to be published or removed.
        retired: whole shards of an earlier ingestion, which the first ones committed will replace.
            Until then the manifest on disk is the earlier one, and nothing here is written to it.
        part: which part of the folder's shards these are, such as ``1-of-4``; empty for all.
        seen: name of the book of hashes that goes with these shards, empty if there is none.
        kind: what the shards are.
    """

    out: Path
    folders: list[str]
    identity: dict[str, Any]
    done: list[DoneInput] = field(default_factory=list[DoneInput])
    unsettled: list[str] = field(default_factory=list[str])
    retired: list[str] = field(default_factory=list[str])
    part: str = ""
    seen: str = ""
    kind: ShardKind = TOKEN_SHARDS

    @property
    def books(self) -> Path:
        return _books(self.out, part=self.part)

    @property
    def stem(self) -> str:
        """What the names of the shards begin with."""
        return _named(self.identity["source"], part=self.part)

    @property
    def path(self) -> Path:
        return self.books / "manifest.json"

    @property
    def staging(self) -> Path:
        return self.books / "staging"

    def notes(self, kind: str, *, path: Path) -> Path:
        """The file of ``kind`` (a folder of the books) that is kept beside the shards of ``path``.

        The options are part of the name, so that a replacement that comes to nothing leaves what
        was noted of the earlier shards alone.
        """
        telling = {k: v for k, v in self.identity.items() if _UNNAMED.get(k, self) != v}
        options = json.dumps(telling, sort_keys=True).encode()
        name = hashlib.sha256(os.fsencode(path) + b"\0" + options).hexdigest()[:16]
        folder = self.books / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.jsonl"

    def shard_numbers(self, folder: str) -> set[int]:
        """Numbers of the shards in ``folder`` that are done."""
        names = (Path(shard) for entry in self.done for shard in entry.shards)
        return {int(name.stem.rpartition("-")[2]) for name in names if name.parent == Path(folder)}

    def find(self, source: Unit) -> DoneInput | None:
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

        The first shards to be committed also replace the retired ones.

        Raises:
            DataError: if a shard of another origin took one of the names.
        """
        if self.retired and not entry.shards:
            # Nothing yet that could replace the earlier shards.
            self.done.append(entry)
            self.clear_staging()
            return
        self.refuse_strangers()
        retired, self.retired = self.retired, []
        self.unsettled = retired + entry.shards
        self.save()
        self._remove(retired)
        for name in entry.shards:
            staged, final = self.staging / name, self.out / name
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, final)
            for beside, place in zip(
                self.kind.beside(staged), self.kind.beside(final), strict=True
            ):
                os.replace(beside, place)
        self._sync_folders(entry.shards)
        self.done.append(entry)
        self.unsettled = []
        self.save()
        self.clear_staging()

    def settle(self) -> None:
        """Remove what is left of shards that were coming or going when a run was killed."""
        if self.unsettled:
            self._remove(self.unsettled)
            self.unsettled = []
            self.save()

    def drop_damaged(self, inputs: Sequence[Unit]) -> list[str]:
        """Forget inputs of which a shard is gone or damaged, with all their shards.

        Returns:
            A line for each, naming the input and the shard.

        Raises:
            DataError: if such an input is not among ``inputs``, so that it could not be done again;
                then nothing is removed.
        """
        problems = [(entry, problem) for entry in self.done if (problem := self._damage(entry))]
        given = {str(source.path) for source in inputs}
        lost = [f"{problem} (from {entry.path})" for entry, problem in problems]
        if any(entry.path not in given for entry, _ in problems):
            raise DataError(
                "; ".join(lost) + ". Give these inputs, too, and they are ingested again; "
                "or restore the shards"
            )
        if problems:
            dropped = [entry for entry, _ in problems]
            self.done = [entry for entry in self.done if entry not in dropped]
            self.unsettled = [name for entry in dropped for name in entry.shards]
            self.save()
            self.settle()
        return [f"{entry.path} is ingested again: {problem}" for entry, problem in problems]

    def refuse_strangers(self) -> None:
        """Check that all shards of this source's name are its own.

        Raises:
            DataError: naming those that are not.
        """
        names = [name for entry in self.done for name in entry.shards] + self.retired
        own = {self.out / name for name in names}
        own |= {beside for path in own for beside in self.kind.beside(path)}
        # Anything under another name is the user's own business.
        pattern = _pattern(self.stem)
        strangers = [
            path.relative_to(self.out).as_posix()
            for folder in self.folders
            for path in _shards(self.out / folder)
            if path not in own and pattern.fullmatch(path.name)
        ]
        if strangers:
            rest = len(strangers) - _NAMED
            named = ", ".join(strangers[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
            raise DataError(
                f"{self.out} holds shards that this ingestion did not write but whose names it may "
                f"need: {named}. Move them to a folder of their own (another source "
                "of the mixture), rename them, or delete them, and run the same command again"
            )

    def save(self) -> None:
        body = {
            "format": _FORMAT,
            "identity": self.identity,
            "done": [asdict(entry) for entry in self.done],
            "unsettled": self.unsettled,
            "seen": self.seen,
        }
        with atomic_file(self.path) as file:
            file.write(json.dumps(body, indent=1).encode())

    def _damage(self, entry: DoneInput) -> str | None:
        """What the cheap check finds wrong with the shards of an input that is done."""
        for name in entry.shards:
            try:
                self.kind.check(self.out / name)
            except DataError as error:
                if isinstance(error.__cause__, OSError):
                    # The disk or the permissions failed; the shard may be sound.
                    raise
                return str(error)
        return None

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            for path in (self.out / name, *self.kind.beside(self.out / name)):
                path.unlink(missing_ok=True)
        self._sync_folders(names)

    def _sync_folders(self, names: Sequence[str]) -> None:
        # The output folder itself, too: a folder below it may be new.
        for folder in {self.out, *((self.out / name).parent for name in names)}:
            if folder.is_dir():
                sync_folder(folder)


def open_books(
    *,
    out: Path,
    folders: Sequence[str],
    identity: dict[str, Any],
    existing: Existing,
    part: str = "",
    kind: ShardKind = TOKEN_SHARDS,
) -> Manifest:
    """Read the books of ``out``, or begin new ones; remove what a killed run left behind.

    With ``Existing.replace`` the earlier shards stay, and stay done, until new ones are committed.

    Raises:
        DataError: if the folder holds shards of unknown origin, of another split into parts, or
            made with other options.
    """
    manifest = Manifest(out=out, folders=list(folders), identity=identity, part=part, kind=kind)
    _refuse_other_splits(manifest)
    if manifest.path.is_file():
        body = _read(manifest.path)
        earlier = Manifest(
            out=out,
            folders=list(folders),
            identity=_LATER_OPTIONS | body["identity"],
            done=[DoneInput(**entry) for entry in body["done"]],
            unsettled=body.get("unsettled", []),
            part=part,
            seen=body.get("seen", ""),
            kind=kind,
        )
        earlier.settle()
        if existing is Existing.replace:
            manifest.retired = [name for entry in earlier.done for name in entry.shards]
        else:
            _refuse_changes(manifest, earlier=earlier)
            manifest.done, manifest.seen = earlier.done, earlier.seen
        manifest.refuse_strangers()
    else:
        strays = [path for folder in folders for path in _shards(out / folder)]
        if part:
            # The other parts' shards lie in the same folder.
            strays = [path for path in strays if _pattern(manifest.stem).fullmatch(path.name)]
        if strays:
            raise DataError(
                f"{out} already holds shards ({strays[0].name}) but no record of how they were "
                "made; choose an empty folder"
            )
        manifest.books.mkdir(parents=True, exist_ok=True)
        manifest.save()
    manifest.clear_staging()
    own = f".*{_named('', part=part)}.json*.tmp"
    for temporary in (*out.glob(own), *manifest.books.rglob(".*.json*.tmp")):
        temporary.unlink()
    return manifest


def _refuse_other_splits(manifest: Manifest) -> None:
    """Raises: DataError if the folder was filled in other parts, so that documents would stand in
    it twice."""
    of = manifest.part.rpartition("-")[2]
    for path in sorted(manifest.out.glob(f"{_BOOKS}*/manifest.json")):
        other = path.parent.name.removeprefix(_BOOKS).removeprefix("-")
        if other.rpartition("-")[2] != of and _read(path)["done"]:
            raise DataError(
                f"{manifest.out} holds shards of {_split(other)}, and this is "
                f"{_split(manifest.part)}; go on with the same parts, or choose another folder"
            )


def _split(part: str) -> str:
    return f"part {part}" if part else "the whole, in one part"


def _refuse_changes(manifest: Manifest, *, earlier: Manifest) -> None:
    """Raises: DataError if shards are there that were made with other options."""
    changes = [
        f"{name} was {earlier.identity.get(name)} and is {value}"
        for name, value in manifest.identity.items()
        # Options may change as long as nothing was made with them.
        if earlier.done and earlier.identity.get(name) != value
    ]
    if changes:
        raise DataError(
            f"{manifest.out} holds shards that were made with other options: "
            + "; ".join(changes)
            + ". "
            "Use them again, choose another folder, or start over with --replace"
        )


@contextlib.contextmanager
def lock_folder(out: Path, *, part: str = "") -> Generator[None, None, None]:
    """Hold ``out``, or a part of it, for one ingestion.

    Raises:
        DataError: if another process holds it.
    """
    books = _books(out, part=part)
    books.mkdir(parents=True, exist_ok=True)
    with (books / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"another run is writing to {books.parent}{f' (part {part})' if part else ''}; "
                "wait for it or choose another folder"
            ) from error
        yield


def _books(out: Path, *, part: str) -> Path:
    return out / _named(_BOOKS, part=part)


def _named(name: str, *, part: str) -> str:
    return f"{name}-{part}" if part else name


def _pattern(stem: str) -> re.Pattern[str]:
    """Names of the shards that begin with ``stem``, and of their indices."""
    return re.compile(re.escape(stem) + r"-\d+\.(tar|idx)")


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
