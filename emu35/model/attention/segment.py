"""Exact attention by segments: the default on CPU, without any S x S matrix.

Consecutive rows whose intervals form a pattern are one segment: causal (end grows by one a row)
or full (all rows see the same keys). A packed sequence is one causal segment a document; a DiDA
image is one full segment over its clean prefix and itself. Each segment is one call of
scaled-dot-product attention over exactly the keys it needs; nothing is merged afterwards.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
import torch.nn.functional as F

from emu35.model.context import AttentionContext
from emu35.model.mask import AttentionMask


class SegmentKind(StrEnum):
    """How the rows of a segment see keys."""

    empty = "empty"
    causal = "causal"
    full = "full"


@dataclass(kw_only=True, slots=True, frozen=True)
class Segment:
    """Rows [row, row + length). ``keys``: the intervals seen by the last row, empty ones left
    out. A causal segment has one interval, of which its first row sees ``first_count`` keys."""

    kind: SegmentKind
    row: int
    length: int
    keys: tuple[tuple[int, int], ...] = ()
    first_count: int = 0


def attend(
    query_BHSD: torch.Tensor,
    *,
    key_BGKD: torch.Tensor,
    value_BGKD: torch.Tensor,
    context: AttentionContext,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention output [B, H, S, D]; rows that see nothing come out as zero."""
    if "segments" not in context.derived:
        assert context.mask is not None
        context.derived["segments"] = find_segments(context.mask)
    rows: list[torch.Tensor] = []
    for b, segments in enumerate(context.derived["segments"]):
        # Batch of one keeps its dimension: SDPA's CPU kernel wants four.
        query, key, value = query_BHSD[b : b + 1], key_BGKD[b : b + 1], value_BGKD[b : b + 1]
        parts = [
            _one(segment, query=query, key=key, value=value, dropout=dropout)
            for segment in segments
        ]
        rows.append(parts[0] if len(parts) == 1 else torch.cat(parts, 2))
    return rows[0] if len(rows) == 1 else torch.cat(rows, 0)


def _one(
    segment: Segment,
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
) -> torch.Tensor:
    query = query.narrow(2, segment.row, segment.length)
    if segment.kind is SegmentKind.empty:
        return torch.zeros_like(query)
    pieces_key = [key.narrow(2, start, end - start) for start, end in segment.keys]
    pieces_value = [value.narrow(2, start, end - start) for start, end in segment.keys]
    key = pieces_key[0] if len(pieces_key) == 1 else torch.cat(pieces_key, 2)
    value = pieces_value[0] if len(pieces_value) == 1 else torch.cat(pieces_value, 2)
    square = segment.kind is SegmentKind.causal and segment.first_count == 1
    triangle = None
    if segment.kind is SegmentKind.causal and not square:
        ones = torch.ones(segment.length, key.shape[2], dtype=torch.bool, device=query.device)
        triangle = ones.tril(segment.first_count - 1)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=triangle,
        dropout_p=dropout,
        is_causal=square and segment.length > 1,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def find_segments(mask: AttentionMask) -> list[list[Segment]]:
    """The segments of every sequence, in row order and covering every row once."""
    stacked = torch.stack([mask.start1_BS, mask.end1_BS, mask.start2_BS, mask.end2_BS], -1)
    return [_segments_of(intervals_S4) for intervals_S4 in stacked.cpu().numpy()]


def _segments_of(intervals_S4: np.ndarray) -> list[Segment]:
    start1, end1, start2, end2 = intervals_S4.T
    has1, has2 = end1 > start1, end2 > start2
    empty = ~has1 & ~has2
    same_keys = (intervals_S4[1:] == intervals_S4[:-1]).all(1)
    grows = (start1[1:] == start1[:-1]) & (end1[1:] == end1[:-1] + 1)
    # What two neighbouring rows have in common decides whether they can share a segment.
    link = np.zeros(len(intervals_S4), dtype=np.int8)  # link[i]: row i with row i + 1
    link[:-1][empty[1:] & empty[:-1]] = 1
    link[:-1][same_keys & ~empty[1:]] = 2
    link[:-1][grows & has1[:-1] & ~has2[1:] & ~has2[:-1]] = 3
    changes = np.flatnonzero(np.diff(link)) + 1
    segments: list[Segment] = []
    row = 0
    for bound in [*changes.tolist(), len(link)]:
        # Rows [row, bound) share link[row], and row ``bound`` still belongs to that pattern.
        if bound <= row:
            continue
        kind = link[row]
        if kind == 0:
            segments.extend(_segment(intervals_S4, i, i, has1, has2) for i in range(row, bound))
            row = bound
        else:
            last = min(bound, len(link) - 1)
            segments.append(_segment(intervals_S4, row, last, has1, has2))
            row = last + 1
    return segments


def _segment(
    intervals_S4: np.ndarray, first: int, last: int, has1: np.ndarray, has2: np.ndarray
) -> Segment:
    start1, end1, start2, end2 = intervals_S4[last].tolist()
    length = last - first + 1
    if not has1[last] and not has2[last]:
        return Segment(kind=SegmentKind.empty, row=first, length=length)
    keys = tuple(
        interval
        for interval, present in (((start1, end1), has1[last]), ((start2, end2), has2[last]))
        if present
    )
    if length > 1 and end1 != intervals_S4[first][1]:
        first_count = int(intervals_S4[first][1]) - start1
        return Segment(
            kind=SegmentKind.causal, row=first, length=length, keys=keys, first_count=first_count
        )
    return Segment(kind=SegmentKind.full, row=first, length=length, keys=keys)
