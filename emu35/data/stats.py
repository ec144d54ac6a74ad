"""What is in a folder of shards, in numbers: lengths, modalities, picture grids, packing.

All but the grids comes from the indices. A grid's rows and columns are in the JSON of its document
alone, so that every document with a picture is looked at.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emu35.config.data import SourceConfig, TokenDataConfig
from emu35.data.opening import open_plan
from emu35.data.pieces import piece_lengths
from emu35.data.place import Place, name_of
from emu35.data.source import Source
from emu35.errors import DataError
from emu35.tokens.serialize import Modality

_PERCENTILES = (1, 10, 50, 90, 99)

Ints = npt.NDArray[np.int64]
Watch = Callable[[int], None]
"""Hears how many documents were looked at so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What is counted of one source, or of several together. N documents.

    Attributes:
        length: [N] tokens of each document.
        modality: [4] tokens of each :class:`~emu35.tokens.serialize.Modality`.
        grids: pictures of each (rows, columns).
        encoders: the image tokenizers of the codes, and what they were computed in.
    """

    shards: int
    length: Ints
    modality: Ints
    grids: Counter[tuple[int, int]]
    encoders: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Documents of ``low`` up to, but not including, ``high`` tokens."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Fill:
    """Share of packed rows of ``length`` that holds tokens, over one epoch; None where they cannot
    be packed, and ``problem`` says why."""

    share: float | None
    length: int
    problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceStats:
    """Statistics of one source, or of several together.

    Attributes:
        percentiles: document lengths in tokens at 1, 10, 50, 90 and 99 percent.
        modality: tokens of each modality, by its name in small letters.
        histogram: documents by length, in bins of powers of two without gaps.
        grids: (rows, columns) of pictures and how many there are, the most frequent first.
        encoders: as in :class:`Counts`.
        fill: None for several sources together.
    """

    name: str
    shards: int
    documents: int
    pictures: int
    tokens: int
    modality: dict[str, int]
    percentiles: dict[int, int]
    longest: int
    histogram: list[Bin]
    grids: list[tuple[int, int, int]]
    encoders: list[str]
    fill: Fill | None = None

    def to_json(self) -> dict[str, Any]:
        """Every number, JSON-ready."""
        fill: dict[str, Any] = {}
        if self.fill is not None:
            fill["fill"] = self.fill.share
            fill |= {"fill_problem": self.fill.problem} if self.fill.problem else {}
        return {
            "name": self.name,
            "shards": self.shards,
            "documents": self.documents,
            "pictures": self.pictures,
            "tokens": self.tokens,
            "modality": self.modality,
            "length_percentiles": {str(rank): value for rank, value in self.percentiles.items()},
            "longest": self.longest,
            "length_histogram": [
                [bin.low, bin.high, bin.documents, bin.tokens] for bin in self.histogram
            ],
            "grids": [list(grid) for grid in self.grids],
            "encoders": self.encoders,
            **fill,
        }


def count_source(source: Source, *, watch: Watch) -> Counts:
    """Count all documents of ``source``; ``watch`` hears of each one with pictures.

    Raises:
        DataError: if it holds no document, or the JSON of one is damaged.
    """
    if len(source) == 0:
        raise DataError(f"shard folder {source.path} holds no document; ingest some into it")
    return Counts(
        shards=len(source.shards),
        length=_lengths(source),
        modality=source.modality.sum(axis=0),
        grids=_grids(source, watch=watch),
        encoders=frozenset(
            f"{meta.vision[:12]}, computed in {meta.vision_dtype or 'a dtype not recorded'}"
            for meta in source.metas
            if meta.vision is not None
        ),
    )


def _lengths(source: Source) -> Ints:
    """[N] tokens of each document; of each piece where the source lies packed."""
    if source.packed is None:
        return source.length
    shards = source.shards
    return np.concatenate(
        [
            piece_lengths(piece_row=shard.piece_row, pieces=shard.pieces, length=shard.length)
            for shard in shards
        ]
    )


def documents_with_pictures(source: Source) -> Ints:
    """Their numbers, ascending."""
    pictures = np.concatenate([np.diff(shard.span_row) for shard in source.shards])
    return np.flatnonzero(pictures)


def _grids(source: Source, *, watch: Watch) -> Counter[tuple[int, int]]:
    grids: Counter[tuple[int, int]] = Counter()
    for done, number in enumerate(documents_with_pictures(source).tolist(), start=1):
        grids.update((rows, columns) for _, _, rows, columns in source.record(number)["images"])
        watch(done)
    return grids


def together(counts: Sequence[Counts]) -> Counts:
    """The counts of several sources as if they were one."""
    return Counts(
        shards=sum(each.shards for each in counts),
        length=np.concatenate([each.length for each in counts]),
        modality=np.sum([each.modality for each in counts], axis=0),
        grids=sum((each.grids for each in counts), Counter[tuple[int, int]]()),
        encoders=frozenset[str]().union(*(each.encoders for each in counts)),
    )


def stats_of(counts: Counts, *, name: str, fill: Fill | None = None) -> SourceStats:
    """Numbers for people from counts."""
    percentiles = np.percentile(counts.length, _PERCENTILES, method="nearest").tolist()
    return SourceStats(
        name=name,
        shards=counts.shards,
        documents=len(counts.length),
        pictures=counts.grids.total(),
        tokens=int(counts.length.sum()),
        modality={code.name.lower(): int(counts.modality[code]) for code in Modality},
        percentiles=dict(zip(_PERCENTILES, map(int, percentiles), strict=True)),
        longest=int(counts.length.max()),
        histogram=histogram(counts.length),
        grids=[
            (rows, columns, number)
            for (rows, columns), number in sorted(
                counts.grids.items(), key=lambda entry: (-entry[1], entry[0])
            )
        ],
        encoders=sorted(counts.encoders),
        fill=fill,
    )


def histogram(length: Ints) -> list[Bin]:
    """Positive lengths [N] in bins [2^k, 2^(k+1)), from the shortest document's to the longest's.

    Lengths of documents spread over four orders of magnitude; equal bins would show one bar.
    """
    power = np.frexp(length.astype(np.float64))[1].astype(np.int64) - 1
    documents = np.bincount(power)
    tokens = np.bincount(power, weights=length)
    first = int(power.min())
    return [
        Bin(low=2**k, high=2 ** (k + 1), documents=int(documents[k]), tokens=int(tokens[k]))
        for k in range(first, len(documents))
    ]


def packing_fill(source: Source, *, sequence_length: int) -> Fill:
    """How full rows of ``sequence_length`` get when this source alone is packed online, or how
    full they are where it lies packed."""
    sequence_length = source.packed or sequence_length
    data = TokenDataConfig(
        sequence_length=sequence_length,
        sources={source.name: SourceConfig(path=str(source.path))},
    )
    try:
        vocabulary = source.metas[0].vocabulary()
        plan = open_plan(data=data, vocabulary=vocabulary, seed=0, global_batch_size=1)
    except DataError as error:
        return Fill(share=None, length=sequence_length, problem=str(error))
    lengths = plan.sources[0].items.length
    samples = plan.planner.take(max(1, int(source.length.sum()) // sequence_length))
    used = sum(int(lengths[item].sum()) for sample in samples for _, item in sample.items)
    return Fill(share=used / (len(samples) * sequence_length), length=sequence_length)


def source_of(path: Place, *, name: str = "") -> Source:
    """The source in folder (or at URL) ``path``, under the folder's name unless one is given.

    Raises:
        DataError: if the folder or a shard cannot be used.
    """
    return Source(name=name or name_of(path), path=path)
