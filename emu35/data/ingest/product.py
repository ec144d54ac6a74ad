"""What inputs are made into: the part in which one kind of ingestion differs from another.

Reading, workers, spools, books and resuming are the same for all of them (:mod:`~.job`).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from emu35.data.ingest.manifest import Manifest
from emu35.data.readers.discover import InputFile
from emu35.data.readers.records import Reject


class Made(Protocol):
    """One thing made of a record; ``hash`` is that by which duplicates are found, empty where it
    has none."""

    @property
    def id(self) -> str: ...

    @property
    def hash(self) -> bytes: ...


Item = TypeVar("Item", bound=Made)
Taken = TypeVar("Taken", bound=Made, contravariant=True)


@dataclass(kw_only=True, slots=True)
class Outcome(Generic[Item]):
    """What came of the next ``records`` records, up to byte ``offset`` of the input."""

    offset: int
    records: int
    documents: list[Item] = field(default_factory=list[Item])
    rejects: list[Reject] = field(default_factory=list[Reject])


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What was written: documents, their tokens, and those of them that are visual."""

    documents: int
    tokens: int
    visual_tokens: int


class Sink(Protocol[Taken]):
    """Open shards; ``paths`` are those that are complete, in the order of the manifest."""

    @property
    def paths(self) -> Sequence[Path]: ...

    def add(self, item: Taken) -> Counts: ...


class Product(Protocol[Item]):
    """Makes items of inputs and puts them into shards. Workers get copies, made by pickling.

    Attributes:
        noun: what an item is called.
        unit: what else progress counts, such as ``codes``; empty for nothing.
    """

    @property
    def noun(self) -> str: ...

    @property
    def unit(self) -> str: ...

    def join(self, *, worker: int, workers: int) -> None:
        """Take this process's share of the machine: it is one of several, counted from 0."""
        ...

    def outcomes(self, source: InputFile) -> Iterator[Outcome[Item]]:
        """What comes of an input, in the order of its records; the same whenever it is asked for.

        Raises:
            Emu35Error: the options are wrong for the input as a whole.
        """
        ...

    def units(self, item: Item) -> int:
        """How much of ``unit`` is in an item."""
        ...

    def pack(self, item: Item) -> bytes:
        """An item as bytes, on its way from a worker."""
        ...

    def unpack(self, data: bytes) -> Item:
        """Inverse of :meth:`pack`."""
        ...

    def open(self, manifest: Manifest, *, source: InputFile) -> AbstractContextManager[Sink[Item]]:
        """Shards in the staging folder for what comes of ``source``; complete at the end of the
        context, gone if that is an exception."""
        ...
