"""All shards of a folder, several at a time, and what only shows when they are seen together."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emu35.config.tokenizer import TokenizerConfig, TokenizerKind
from emu35.data.index import find_shards
from emu35.data.shards import ShardMeta
from emu35.data.validate.document import GridSizes
from emu35.data.validate.problem import Check, Problem
from emu35.data.validate.shard import ShardReport, validate_shard
from emu35.errors import DataError, TokenizerError
from emu35.tokens.text import build_text_tokenizer

Ints = npt.NDArray[np.int64]


class Tokenizers:
    """The text tokenizers that shards name, each built once; ``table`` is the file of the kind
    ``emu35``. Where that file is not to be had, sizes of grids go unchecked and ``missing`` says
    why."""

    def __init__(self, *, table: str | None) -> None:
        self.missing = ""
        self._table = table
        self._built: dict[tuple[str, int], GridSizes] = {}
        self._lock = threading.Lock()

    def sizes_of(self, meta: ShardMeta) -> GridSizes:
        """Raises: ValueError if there is no tokenizer of this kind."""
        key = (meta.kind, meta.codebook_size)
        with self._lock:
            if key not in self._built:
                config = TokenizerConfig(
                    kind=TokenizerKind(meta.kind),
                    codebook_size=meta.codebook_size,
                    table=self._table,
                )
                tokenizer = None
                try:
                    tokenizer = build_text_tokenizer(config)
                except TokenizerError as error:
                    self.missing = str(error)
                self._built[key] = GridSizes(tokenizer)
            return self._built[key]


@dataclass(frozen=True, kw_only=True, slots=True)
class Duplicates:
    """How many ``documents`` have an id that was there before, and the first with the one before
    it."""

    documents: int
    first: str
    second: str


@dataclass(kw_only=True, slots=True)
class FolderReport:
    """What was found in a folder, without its problems, which are handed out as they are found.

    Attributes:
        problems: how many there are, ``damaged`` in how many shards.
    """

    path: Path
    shards: int = 0
    bytes: int = 0
    documents: int = 0
    tokens: int = 0
    pictures: int = 0
    problems: int = 0
    damaged: int = 0
    _names: list[tuple[str, Ints, Ints]] = field(default_factory=list[tuple[str, Ints, Ints]])
    _first: tuple[str, ShardMeta] | None = None

    def add(self, shard: ShardReport) -> list[Problem]:
        """Count a shard; returns its problems, with those that show only beside others."""
        problems = [*shard.problems, *self._unlike_first(shard)]
        self.shards += 1
        self.bytes += shard.bytes
        self.documents += shard.documents
        self.tokens += shard.tokens
        self.pictures += shard.pictures
        self.problems += len(problems)
        self.damaged += bool(problems)
        # Numbers rather than the ids themselves: there may be hundreds of millions.
        names, rows = (np.array(values, np.int64) for values in (shard.names, shard.named))
        self._names.append((shard.path.name, names, rows))
        return problems

    def duplicates(self) -> Duplicates | None:
        """Documents whose id an earlier document of the folder has; None where there are none."""
        names = np.concatenate([np.zeros(0, np.int64), *(names for _, names, _ in self._names)])
        order = np.argsort(names, kind="stable")
        again = np.flatnonzero(names[order][1:] == names[order][:-1])
        if not len(again):
            return None
        first = again[np.argmin(order[again + 1])]
        return Duplicates(
            documents=len(again),
            first=self._place(int(order[first])),
            second=self._place(int(order[first + 1])),
        )

    def _place(self, number: int) -> str:
        for shard, _, rows in self._names:
            if number < len(rows):
                return f"document {rows[number]} of {shard}"
            number -= len(rows)
        raise AssertionError("a number beyond all documents")

    def _unlike_first(self, shard: ShardReport) -> Iterator[Problem]:
        """What training would refuse: shards of one folder from several tokenizers."""
        if shard.meta is None:
            return
        if self._first is None:
            self._first = (shard.path.name, shard.meta)
        name, meta = self._first
        pairs = [
            ("tokenizer", _tokenizer(meta), _tokenizer(shard.meta)),
            ("image tokenizer", meta.vision, shard.meta.vision),
        ]
        for what, theirs, own in pairs:
            if None not in (theirs, own) and theirs != own:
                yield Problem(
                    check=Check.folder,
                    text=f"it was made with {what} {own}, but {name} with {theirs}",
                    folder=self.path,
                    shard=shard.path.name,
                )


def _tokenizer(meta: ShardMeta) -> str:
    return f"{meta.kind} ({meta.n_text} text ids, {meta.codebook_size} codes)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What reading one more shard brought: ``report`` is that of its folder so far, ``last``
    whether the folder is done. A folder without shards has one of these, too."""

    report: FolderReport
    problems: list[Problem]
    bytes: int
    documents: int
    last: bool


def shards_of(folders: Sequence[Path]) -> dict[Path, list[Path] | Problem]:
    """The shards of each folder, or why it has none."""
    found: dict[Path, list[Path] | Problem] = {}
    for folder in folders:
        try:
            found[folder] = find_shards(folder)
        except (DataError, OSError) as error:
            found[folder] = Problem(check=Check.folder, text=str(error), folder=folder)
    return found


def validate_folder(
    path: Path, shards: Sequence[Path] | Problem, *, tokenizers: Tokenizers, threads: int
) -> Iterator[Found]:
    """Validate ``shards`` of the folder ``path``, ``threads`` of them at a time; results come in
    their order. A damaged shard stops nothing."""
    report = FolderReport(path=path)
    if isinstance(shards, Problem):
        report.problems = 1
        yield Found(report=report, problems=[shards], bytes=0, documents=0, last=True)
        return
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="emu35-validate")
    try:
        futures: deque[Future[ShardReport]] = deque(
            pool.submit(validate_shard, shard, sizes_of=tokenizers.sizes_of) for shard in shards
        )
        while futures:
            shard = futures.popleft().result()
            yield Found(
                report=report,
                problems=report.add(shard),
                bytes=shard.bytes,
                documents=shard.documents,
                last=not futures,
            )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
