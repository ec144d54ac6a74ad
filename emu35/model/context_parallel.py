"""Context parallelism: one sequence over several ranks, with explicit masks and positions.

Two ways to exchange, named as in megatron-core's ``cp_comm_type``. ``all_gather``: every rank keeps
its rows of the queries and gathers all keys and values; rows are dealt out in blocks so that every
rank has as many rows and about as many visible keys, whatever the mask (packed documents make the
usual zigzag uneven). ``a2a`` (DeepSpeed-Ulysses, arXiv 2309.14509): an all-to-all turns rows of all
heads into all rows of some heads, and back; the mask then stays whole.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from emu35.config.parallel import CPCommType
from emu35.model.mask import AttentionMask

BLOCKS = (16, 8, 4, 2)
"""Blocks a rank: the first of these that divides the sequence. More balance better and cut
documents into more pieces."""


@dataclass(kw_only=True, slots=True, frozen=True)
class SequenceSplit:
    """Which rows this rank holds, and how it reaches the others.

    Attributes:
        kind: how ranks exchange.
        rows_S: ascending row numbers of this rank, int64 [S / cp].
        inverse_S: place of every row in the ranks' rows laid end to end, int64 [S], on the device
            of keys and values.
        group: the context-parallel ranks.
    """

    kind: CPCommType
    rows_S: torch.Tensor
    inverse_S: torch.Tensor
    group: dist.ProcessGroup

    def local_mask(self, mask: AttentionMask) -> AttentionMask:
        """The mask that this rank's attention needs: its own rows, or all of them for ``a2a``."""
        return mask if self.kind is CPCommType.a2a else mask.take(self.rows_S)

    def gather_keys(
        self, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all rows in their order, from those of this rank's rows."""
        both = torch.cat([key_SBGD, value_SBGD], -1)
        gathered: torch.Tensor = _GatherRows.apply(both, self.group)  # type: ignore[assignment]
        key, value = gathered.index_select(0, self.inverse_S).chunk(2, -1)
        return key, value

    def gather_rows(self, states_SBH: torch.Tensor) -> torch.Tensor:
        """[S / cp, B, H] of this rank's rows -> [S, B, H] of all rows in their order; the gradient
        of this rank's rows is the sum over ranks."""
        gathered: torch.Tensor = _GatherRows.apply(states_SBH, self.group)  # type: ignore[assignment]
        return gathered.index_select(0, self.inverse_S)

    def scatter_heads(self, states_SBND: torch.Tensor) -> torch.Tensor:
        """[S / cp, B, heads, D] of this rank's rows -> [S, B, heads / cp, D] of its heads. Fewer
        heads than ranks are repeated, each for the ranks that share it."""
        size = dist.get_world_size(self.group)
        if states_SBND.shape[2] < size:
            states_SBND = states_SBND.repeat_interleave(size // states_SBND.shape[2], 2)
        parts = states_SBND.unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4)
        return _AllToAll.apply(parts.contiguous(), self.group).flatten(0, 1)  # type: ignore[union-attr]

    def gather_heads(self, states_SBND: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`scatter_heads`, where no head was repeated."""
        size = dist.get_world_size(self.group)
        parts = states_SBND.unflatten(0, (size, -1)).contiguous()
        exchanged: torch.Tensor = _AllToAll.apply(parts, self.group)  # type: ignore[assignment]
        return exchanged.permute(1, 2, 0, 3, 4).flatten(2, 3)


def split_sequence(
    mask: AttentionMask, *, kind: CPCommType, group: dist.ProcessGroup, device: torch.device
) -> SequenceSplit:
    """Deal the rows of ``mask`` out to the ranks of ``group``; the same on all of them. ``device``
    is where keys and values will be; the dealing itself happens on the CPU."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    length = mask.start1_BS.shape[1]
    if kind is CPCommType.a2a:
        shares = torch.arange(length).chunk(size)
    else:
        shares = deal_rows(mask.visible_keys().sum(0), ranks=size)
    return SequenceSplit(
        kind=kind,
        rows_S=shares[rank],
        inverse_S=torch.cat(tuple(shares)).argsort().to(device),
        group=group,
    )


def deal_rows(work_S: torch.Tensor, *, ranks: int) -> list[torch.Tensor]:
    """Rows of each rank, ascending, as many for each and with about the same total ``work_S``.

    Blocks of rows go, heaviest first, to the rank with the least work that still has room.
    """
    length = len(work_S)
    count = ranks * next(blocks for blocks in BLOCKS if length % (blocks * ranks) == 0)
    work = work_S.cpu().view(count, -1).sum(1).tolist()
    held: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for block in sorted(range(count), key=lambda block: (-work[block], block)):
        open_ranks = [rank for rank in range(ranks) if len(held[rank]) < count // ranks]
        chosen = min(open_ranks, key=lambda rank: (load[rank], rank))
        held[chosen].append(block)
        load[chosen] += work[block]
    rows = torch.arange(length).view(count, -1)
    return [rows[sorted(blocks)].flatten() for blocks in held]


class _GatherRows(torch.autograd.Function):
    """All ranks' rows laid end to end; the gradient of each rank's rows is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        size = dist.get_world_size(group)
        gathered = rows.new_empty(size * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        size = dist.get_world_size(ctx.group)
        summed = grad.new_empty(grad.shape[0] // size, *grad.shape[1:])
        dist.reduce_scatter_tensor(summed, grad.contiguous(), group=ctx.group)
        return summed, None


class _AllToAll(torch.autograd.Function):
    """Part i of this rank goes to rank i; the gradient takes the way back."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _exchange(parts, group=group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(grads[0].contiguous(), group=ctx.group), None


def _exchange(parts: torch.Tensor, *, group: dist.ProcessGroup) -> torch.Tensor:
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received
