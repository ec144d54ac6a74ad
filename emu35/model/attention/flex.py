"""Flex attention (torch's compiled kernels) under the interval mask; the fast backend on GPUs.

Two costs of the usual way are avoided. The block mask is counted directly from the intervals: each
row adds one to the first block that it touches and takes one off behind the last, so a running sum
over blocks says how many rows of a query block see some, or all, of a key block; no S x S matrix
and no compiled search. And lengths are rounded up to few values, because each new length compiles
a new kernel.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from emu35.model.context import AttentionContext
from emu35.model.mask import AttentionMask

BLOCK = 128
"""Rows and keys of a block."""
BUCKETS_PER_OCTAVE = 8
"""Padded lengths between a number and its double: at most an eighth of the rows is padding."""


def attend(
    query_BHSD: torch.Tensor,
    *,
    key_BGKD: torch.Tensor,
    value_BGKD: torch.Tensor,
    context: AttentionContext,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention output [B, H, S, D]; rows that see nothing come out as zero."""
    assert dropout == 0.0, "refused when the model was built"
    length, num_keys = query_BHSD.shape[2], key_BGKD.shape[2]
    key = ("flex", num_keys)
    if key not in context.derived:
        assert context.mask is not None
        context.derived[key] = block_mask(context.mask, num_keys=num_keys, device=query_BHSD.device)
    output_BHSD = _compiled()(
        _padded(query_BHSD, bucket(length)),
        _padded(key_BGKD, bucket(num_keys)),
        _padded(value_BGKD, bucket(num_keys)),
        block_mask=context.derived[key],
        enable_gqa=query_BHSD.shape[1] != key_BGKD.shape[1],
    )
    return output_BHSD[:, :, :length]


def bucket(length: int) -> int:
    """The padded length of ``length``: a multiple of a block, one of few in every octave."""
    octave = 1 << max(0, (length - 1).bit_length() - 1)  # the power of two below
    grain = max(BLOCK, octave // BUCKETS_PER_OCTAVE)
    return -(-length // grain) * grain


def block_mask(mask: AttentionMask, *, num_keys: int, device: torch.device) -> BlockMask:
    """The block mask of ``mask`` on ``device``, rows and keys padded to their buckets; the padding
    sees nothing and is seen by nobody."""
    rows = bucket(mask.start1_BS.shape[1])
    extra = rows - mask.start1_BS.shape[1]
    fields = (mask.start1_BS, mask.end1_BS, mask.start2_BS, mask.end2_BS)
    intervals_4BS = torch.stack([F.pad(field, (0, extra)) for field in fields])
    partial, full = count_blocks(intervals_4BS.cpu().numpy(), num_blocks=bucket(num_keys) // BLOCK)
    partial_count, partial_index = _ordered(partial, device=device)
    full_count, full_index = _ordered(full, device=device)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_index,
        full_count,
        full_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=_inside(intervals_4BS.to(device, dtype=torch.int32)),
        seq_lengths=(rows, bucket(num_keys)),
    )


def count_blocks(intervals_4BS: np.ndarray, *, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Which key blocks a query block sees in part, and which in full: bool [B, S / block, blocks].

    ``intervals_4BS`` holds start1, end1, start2, end2; S is a multiple of the block.
    """
    batch, length = intervals_4BS.shape[1:]
    first, second = _disjoint(intervals_4BS)
    # Every row's query block, as an offset into the counts of all (query block, key block) pairs.
    offset_BS = (np.arange(batch * length) // BLOCK * (num_blocks + 1)).reshape(batch, length)
    shape = (batch, length // BLOCK, num_blocks + 1)
    seen, whole = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for start_BS, end_BS in (first, second):
        some = end_BS > start_BS
        start, end, offset = start_BS[some], end_BS[some], offset_BS[some]
        _add_runs(seen, offset=offset, first=start // BLOCK, past=(end - 1) // BLOCK + 1)
        inner_first, inner_past = -(-start // BLOCK), end // BLOCK
        inner = inner_past > inner_first
        _add_runs(whole, offset=offset[inner], first=inner_first[inner], past=inner_past[inner])
    full = whole.cumsum(2)[:, :, :-1] == BLOCK
    return (seen.cumsum(2)[:, :, :-1] > 0) & ~full, full


def _disjoint(intervals_4BS: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Both intervals of every row, joined where they touch or overlap (the second is empty then);
    a block that only both together cover is covered all the same."""
    start1, end1, start2, end2 = intervals_4BS
    has1, has2 = end1 > start1, end2 > start2
    if not has2.any():
        return (start1, end1), (start2, end2)
    joined = has1 & has2 & (start2 <= end1) & (start1 <= end2)
    low, high = np.minimum(start1, start2), np.maximum(end1, end2)
    return (
        (np.where(joined, low, start1), np.where(joined, high, end1)),
        (start2, np.where(joined, start2, end2)),
    )


def _add_runs(
    counts: np.ndarray, *, offset: np.ndarray, first: np.ndarray, past: np.ndarray
) -> None:
    """+1 where a run of blocks begins and -1 behind it, for a running sum to add up."""
    size = counts.size
    change = np.bincount(offset + first, minlength=size) - np.bincount(
        offset + past, minlength=size
    )
    counts += change.reshape(counts.shape)


def _ordered(blocks: np.ndarray, *, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key blocks each query block has, [B, 1, Q], and their numbers in front of the
    others, [B, 1, Q, K]: what BlockMask wants."""
    count = torch.from_numpy(blocks.sum(-1).astype(np.int32))
    index = torch.from_numpy(np.argsort(~blocks, axis=-1, kind="stable").astype(np.int32))
    return count[:, None].to(device), index[:, None].to(device)


def _inside(intervals_4BS: torch.Tensor) -> Callable[..., torch.Tensor]:
    start1_BS, end1_BS, start2_BS, end2_BS = intervals_4BS

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        del h
        first = (k >= start1_BS[b, q]) & (k < end1_BS[b, q])
        return first | ((k >= start2_BS[b, q]) & (k < end2_BS[b, q]))

    return visible


def _padded(states_BHSD: torch.Tensor, length: int) -> torch.Tensor:
    extra = length - states_BHSD.shape[2]
    return F.pad(states_BHSD, (0, 0, 0, extra)) if extra else states_BHSD


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
