"""Looking at shards: what a source holds, and single documents decoded."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from emu35.data.loader import open_source, plan_source
from emu35.data.place import Place, name_of
from emu35.data.plan import Planner
from emu35.data.source import Source
from emu35.errors import DataError
from emu35.tokens.serialize import Modality
from emu35.tokens.text import TextTokenizer

_PERCENTILES = (1, 10, 50, 90, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceStats:
    """Statistics of one source.

    Attributes:
        percentiles: document lengths in tokens at 1, 10, 50, 90 and 99 percent.
        shares: share of each modality, by tokens.
        fill: share of a packed row of ``sequence_length`` that holds tokens, over one epoch.
        vision: the image tokenizers of the codes, and what they were computed in.
    """

    name: str
    shards: int
    documents: int
    tokens: int
    percentiles: dict[int, int]
    longest: int
    shares: dict[str, float]
    sequence_length: int
    fill: float
    vision: list[str] = field(default_factory=list[str])

    def lines(self) -> list[str]:
        """A few lines to print."""
        lengths = "  ".join(f"p{rank} {value}" for rank, value in self.percentiles.items())
        shares = "  ".join(f"{name} {share:.1%}" for name, share in self.shares.items())
        return [
            f"{self.name}: {self.documents} documents, {self.tokens} tokens, {self.shards} shards",
            f"  length   {lengths}  max {self.longest}",
            f"  tokens   {shares}",
            f"  packing  {self.fill:.2%} of rows of {self.sequence_length}",
            *(f"  codes    of image tokenizer {line}" for line in self.vision),
        ]


def source_stats(path: Place, *, sequence_length: int, open_bins: int = 16) -> SourceStats:
    """Statistics of the source in ``path``.

    Raises:
        DataError: if the folder or a shard cannot be used.
    """
    name = name_of(path)
    first = Source(name=name, path=path)
    sequence_length = first.packed or sequence_length
    entry = open_source(
        name=name,
        path=path,
        vocabulary=first.metas[0].vocabulary(),
        limit=sequence_length,
    )
    source, total = entry.source, int(entry.source.length.sum())
    counts = source.modality.sum(axis=0)
    length = source.length if source.packed is None else entry.items.length
    percentiles = np.percentile(length, _PERCENTILES, method="nearest")
    planner = Planner(
        sources=[plan_source(entry, ratio=1.0)],
        sequence_length=sequence_length,
        open_bins=open_bins,
        shuffle_window=4096,
        seed=0,
    )
    samples = planner.take(max(1, total // sequence_length))
    used = sum(int(entry.items.length[item].sum()) for s in samples for _, item in s.items)
    return SourceStats(
        name=name,
        shards=len(source.shards),
        documents=len(length),
        tokens=total,
        percentiles={
            rank: int(value) for rank, value in zip(_PERCENTILES, percentiles, strict=True)
        },
        longest=int(length.max()),
        shares={code.name.lower(): float(counts[code] / total) for code in Modality},
        sequence_length=sequence_length,
        fill=used / (len(samples) * sequence_length),
        vision=sorted(
            {
                f"{meta.vision[:12]}, computed in {meta.vision_dtype or 'a dtype not recorded'}"
                for meta in source.metas
                if meta.vision is not None
            }
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownImage:
    """A picture of a document as codes [H, W]."""

    codes_HW: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownDocument:
    """A document decoded from its tokens: texts (specials written out) and pictures in order."""

    id: str
    number: int
    tokens: int
    parts: list[str | ShownImage]

    def text(self) -> str:
        """One string, pictures as ``[image 6x6]``."""
        return "".join(
            part
            if isinstance(part, str)
            else f"[image {part.codes_HW.shape[0]}x{part.codes_HW.shape[1]}]"
            for part in self.parts
        )


def show_documents(
    source: Source, *, tokenizer: TextTokenizer, first: int, count: int
) -> Iterator[ShownDocument]:
    """Decode up to ``count`` documents of ``source`` from number ``first``.

    Raises:
        DataError: if there is no document ``first``.
    """
    if not 0 <= first < len(source):
        raise DataError(
            f"{source.path} has no document {first}; it has {len(source)}, counted from 0"
        )
    for number in range(first, min(first + count, len(source))):
        yield _show(source, number=number, tokenizer=tokenizer)


def _show(source: Source, *, number: int, tokenizer: TextTokenizer) -> ShownDocument:
    vocabulary = tokenizer.vocabulary
    facts: dict[str, Any] = json.loads(source.facts(number))
    ids = source.words(number)[0].astype(np.int64)
    parts: list[str | ShownImage] = []
    before = 0
    for start, end, rows, columns in facts["images"]:
        if start > before:
            parts.append(tokenizer.decode(ids[before:start].tolist()))
        codes = ids[start:end]
        codes = codes[codes >= vocabulary.visual_start] - vocabulary.visual_start
        parts.append(ShownImage(codes_HW=codes.reshape(rows, columns)))
        before = end
    if before < len(ids):
        parts.append(tokenizer.decode(ids[before:].tolist()))
    return ShownDocument(id=facts["id"], number=number, tokens=len(ids), parts=parts)
