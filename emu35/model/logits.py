"""From hidden states to the loss or to logits, without ever holding all logits of a sequence.

The output layer is split over tensor-parallel ranks by vocabulary rows. The loss projects a chunk
of tokens at a time, combines maxima and sums over ranks, and forms the gradient right there
(softmax minus one-hot), so that backward has nothing left to recompute. Rows that only pad the
vocabulary to a multiple of the ranks take no part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from emu35.model.transformer import Emu35Model
from emu35.parallel import cpu
from emu35.parallel.mesh import current_mesh

cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.mappings import (  # noqa: E402
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

_ROWS = 16_384
"""Vocabulary rows whose gradient is added at a time where the weights are not fp32."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Rows:
    """This rank's part of the vocabulary: ids [start, start + count)."""

    start: int
    count: int
    group: dist.ProcessGroup | None


def weighted_cross_entropy(
    model: Emu35Model,
    *,
    hidden_SBH: torch.Tensor,
    labels_BS: torch.Tensor,
    weights_BS: torch.Tensor,
    chunk: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over tokens of weight x cross-entropy, and the cross-entropy of every token.

    Args:
        model: its ``output_layer`` is the projection.
        hidden_SBH: hidden states of the last stage (this rank's slice under sequence parallelism).
        labels_BS: label ids int64 [B, S].
        weights_BS: fp32 [B, S], usually already divided by their global sum; a token of weight 0
            costs nothing.
        chunk: token rows projected at a time.

    Returns:
        The scalar loss (differentiable) and detached per-token losses fp32 [B, S] (0 where the
        weight is 0).
    """
    hidden_SBH = hidden_for_projection(model, hidden_SBH)
    weights_N = weights_BS.t().reshape(-1)
    chosen = weights_N.nonzero().squeeze(1)
    hidden_NH = hidden_SBH.reshape(-1, hidden_SBH.shape[-1]).index_select(0, chosen)
    loss, losses_M = _ProjectedCrossEntropy.apply(
        hidden_NH,
        model.output_weight,
        labels_BS.t().reshape(-1)[chosen],
        weights_N[chosen].float(),
        own_rows(model),
        chunk,
    )
    losses_N = torch.zeros_like(weights_N, dtype=torch.float32)
    losses_N[chosen] = losses_M
    return loss, losses_N.view(*hidden_SBH.shape[:2]).t()


def hidden_for_projection(model: Emu35Model, hidden_SBH: torch.Tensor) -> torch.Tensor:
    """Hidden states of all rows, as the split output layer wants them: gathered under sequence
    parallelism, their gradient summed over tensor-parallel ranks."""
    if model.config.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=True)
    return copy_to_tensor_model_parallel_region(hidden_SBH)


class _ProjectedCrossEntropy(torch.autograd.Function):
    """Projection, softmax and cross-entropy in one, chunked over tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_N: torch.Tensor,
        weights_N: torch.Tensor,
        rows: Rows,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight_RH = weight_VH[: rows.count]
        losses_N = torch.empty_like(weights_N)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        trained = ctx.needs_input_grad[1]
        grad_hidden_NH = torch.empty_like(hidden_NH if needs_grad else hidden_NH[:0])
        # fp32, for the sum over chunks must not be rounded to bf16 at every step.
        grad_weight_VH = torch.zeros_like(
            weight_VH if trained else weight_VH[:0], dtype=torch.float32
        )
        space = Space.of(min(chunk, len(labels_N)), weight_RH=weight_RH)
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            exponentials_CR, sums_C, losses_N[part], local_C = _exponentials(
                space.project(hidden_NH[part], weight_RH=weight_RH),
                labels_C=labels_N[part],
                rows=rows,
            )
            if needs_grad:
                # weight x (softmax - one-hot), in one pass over the vocabulary.
                weights_C = weights_N[part]
                exponentials_CR.mul_((weights_C / sums_C)[:, None])
                held = (local_C >= 0).nonzero().squeeze(1)
                exponentials_CR[held, local_C[held]] -= weights_C[held]
                grad_CR = space.in_type_of_weights(exponentials_CR)
                torch.mm(grad_CR, weight_RH, out=grad_hidden_NH[part])
                if trained:
                    _accumulate(
                        grad_weight_VH[: rows.count], grad_CR=grad_CR, hidden=hidden_NH[part]
                    )
        if needs_grad:
            ctx.save_for_backward(grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype))
        ctx.mark_non_differentiable(losses_N)
        return (weights_N * losses_N).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden_NH, grad_weight_VH = ctx.saved_tensors
        scale = grads[0]
        if scale.item() != 1.0:
            grad_hidden_NH = grad_hidden_NH * scale.to(grad_hidden_NH.dtype)
            grad_weight_VH = grad_weight_VH * scale.to(grad_weight_VH.dtype)
        trained = ctx.needs_input_grad[1]
        return grad_hidden_NH, grad_weight_VH if trained else None, None, None, None, None


@dataclass(kw_only=True, slots=True, frozen=True)
class Space:
    """Memory for one chunk of logits, taken once for all: a new gigabyte for every chunk would be
    filled with zeros by the system first, and lie beside the old one at the turn of a chunk.

    ``projected_CR`` has the weights' type; it is ``logits_CR`` itself where that is fp32.
    """

    logits_CR: torch.Tensor
    projected_CR: torch.Tensor

    @classmethod
    def of(cls, chunk: int, *, weight_RH: torch.Tensor) -> "Space":
        """For chunks of up to ``chunk`` hidden rows."""
        logits_CR = weight_RH.new_empty((chunk, len(weight_RH)), dtype=torch.float32)
        whole = weight_RH.dtype == torch.float32
        return cls(
            logits_CR=logits_CR,
            projected_CR=logits_CR
            if whole
            else logits_CR.new_empty(logits_CR.shape, dtype=weight_RH.dtype),
        )

    def project(self, hidden_CH: torch.Tensor, *, weight_RH: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [C, R]; they last until the next call."""
        projected_CR = self.projected_CR[: len(hidden_CH)]
        torch.mm(hidden_CH, weight_RH.t(), out=projected_CR)
        if self.projected_CR is self.logits_CR:
            return projected_CR
        return self.logits_CR[: len(hidden_CH)].copy_(projected_CR)

    def in_type_of_weights(self, values_CR: torch.Tensor) -> torch.Tensor:
        """``values_CR`` as the matrix products with the weights want them."""
        if self.projected_CR is self.logits_CR:
            return values_CR
        return self.projected_CR[: len(values_CR)].copy_(values_CR)


def _exponentials(
    logits_CR: torch.Tensor, *, labels_C: torch.Tensor, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp(logits - highest) over this rank's rows [C, R] in place of the logits, its sum over all
    rows [C], the cross-entropy [C], and the label's index among this rank's rows [C] (-1 where
    another rank holds it)."""
    highest_C = logits_CR.amax(1)
    if rows.group is not None:
        dist.all_reduce(highest_C, op=dist.ReduceOp.MAX, group=rows.group)
    logits_CR -= highest_C[:, None]
    inside_C = (labels_C >= rows.start) & (labels_C < rows.start + rows.count)
    local_C = torch.where(inside_C, labels_C - rows.start, -1)
    label_logits_C = logits_CR.gather(1, local_C.clamp(min=0)[:, None]).squeeze(1)
    label_logits_C = label_logits_C.masked_fill(~inside_C, 0.0)
    exponentials_CR = logits_CR.exp_()
    sums_C = exponentials_CR.sum(1)
    if rows.group is not None:
        both = torch.stack([label_logits_C, sums_C])
        dist.all_reduce(both, group=rows.group)
        label_logits_C, sums_C = both
    return exponentials_CR, sums_C, sums_C.log() - label_logits_C, local_C


def _accumulate(total_RH: torch.Tensor, *, grad_CR: torch.Tensor, hidden: torch.Tensor) -> None:
    if total_RH.dtype == grad_CR.dtype:
        total_RH.addmm_(grad_CR.t(), hidden)
    else:
        # Block by block: the product in bf16, and on a CPU its fp32 copy for the sum, would be as
        # large as all weights and the total together.
        blocks = zip(total_RH.split(_ROWS), grad_CR.split(_ROWS, 1), strict=True)
        for total, grad_CQ in blocks:
            total += grad_CQ.t() @ hidden


def own_rows(model: Emu35Model) -> Rows:
    """The part of the vocabulary that this rank holds."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    held = model.output_weight.shape[0]
    start = held * parallel_state.get_tensor_model_parallel_rank()
    return Rows(
        start=start,
        count=max(0, min(held, model.vocabulary_size - start)),
        group=current_mesh().tp_group if size > 1 else None,
    )


@torch.no_grad()
def vocabulary_logits(model: Emu35Model, *, hidden_NH: torch.Tensor) -> torch.Tensor:
    """Logits fp32 [N, vocabulary] of a few hidden rows: :func:`range_logits` of all ids."""
    return range_logits(model, hidden_NH=hidden_NH, start=0, end=model.vocabulary_size)


@torch.no_grad()
def range_logits(
    model: Emu35Model, *, hidden_NH: torch.Tensor, start: int, end: int
) -> torch.Tensor:
    """Logits fp32 [N, end - start] of a few hidden rows for the ids [start, end), gathered over
    tensor-parallel ranks. No other row of the projection is read. Meant for sampling; training goes
    through the chunked loss."""
    rows = own_rows(model)
    first, last = max(start, rows.start), min(end, rows.start + rows.count)
    weight_RH = model.output_weight[first - rows.start : max(first, last) - rows.start]
    logits_NR = _project(hidden_NH, weight_RH=weight_RH)
    if rows.group is None:
        return logits_NR
    held = model.output_weight.shape[0]
    bounds = [
        (max(start, rank * held), min(end, (rank + 1) * held))
        for rank in range(dist.get_world_size(rows.group))
    ]
    counts = [max(0, last - first) for first, last in bounds]
    # Collectives want equal parts.
    part_NR = logits_NR.new_zeros(len(hidden_NH), max(counts))
    part_NR[:, : logits_NR.shape[1]] = logits_NR
    parts = [torch.empty_like(part_NR) for _ in counts]
    dist.all_gather(parts, part_NR, group=rows.group)
    return torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], 1)


class RangeProjection:
    """:func:`range_logits` of up to ``count`` hidden rows at a time, in memory that is taken once;
    for whoever projects thousands of rows at every step and must not ask for gigabytes anew.

    Args:
        start, end: the ids.
        count: hidden rows at a time.
    """

    def __init__(self, model: Emu35Model, *, start: int, end: int, count: int) -> None:
        rows, held = own_rows(model), model.output_weight.shape[0]
        ranks = 1 if rows.group is None else dist.get_world_size(rows.group)
        first, last = max(start, rows.start), min(end, rows.start + rows.count)
        self.count, self._group = count, rows.group
        self._weight_RH = model.output_weight[first - rows.start : max(first, last) - rows.start]
        self._widths = [
            max(0, min(end, (rank + 1) * held) - max(start, rank * held)) for rank in range(ranks)
        ]
        weight_RH, widest = self._weight_RH, max(self._widths)

        def space(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=weight_RH.device)

        self._part_CR = space(count, widest)
        whole = weight_RH.dtype == torch.float32
        self._narrow_CR = None if whole else space(count, widest, dtype=weight_RH.dtype)
        self._parts_PCR = space(ranks, count, widest) if rows.group is not None else None
        self._logits_CV = space(count, end - start) if rows.group is not None else None

    @torch.no_grad()
    def __call__(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [C, end - start], C at most ``count``; they last until the next call."""
        taken, own = len(hidden_CH), len(self._weight_RH)
        part_CR = self._part_CR[:taken]
        target_CR = part_CR if self._narrow_CR is None else self._narrow_CR[:taken]
        torch.mm(hidden_CH, self._weight_RH.t(), out=target_CR[:, :own])
        if self._narrow_CR is not None:
            part_CR.copy_(target_CR)
        if self._parts_PCR is None or self._logits_CV is None:
            return part_CR
        parts = [each_CR[:taken] for each_CR in self._parts_PCR]
        dist.all_gather(parts, part_CR, group=self._group)
        logits_CV, begin = self._logits_CV[:taken], 0
        for each_CR, width in zip(parts, self._widths, strict=True):
            logits_CV[:, begin : begin + width] = each_CR[:, :width]
            begin += width
        return logits_CV


@torch.no_grad()
def id_logits(model: Emu35Model, *, hidden_NH: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Logits fp32 [N, len(ids)] of a few ids that need not be neighbours."""
    rows = own_rows(model)
    ids_M = torch.tensor(ids, device=hidden_NH.device) - rows.start
    held_M = (ids_M >= 0) & (ids_M < rows.count)
    weight_MH = model.output_weight.index_select(0, ids_M.clamp(0, max(rows.count - 1, 0)))
    logits_NM = (hidden_NH @ weight_MH.t()).float().masked_fill_(~held_M, 0.0)
    if rows.group is not None:
        dist.all_reduce(logits_NM, group=rows.group)
    return logits_NM


def _project(hidden_NH: torch.Tensor, *, weight_RH: torch.Tensor) -> torch.Tensor:
    """Logits fp32 [N, R] of a few rows.

    A CPU's matrix product spreads the rows of its first operand over threads: as weight x hidden
    each thread streams its own part of the weights, which for a few hidden rows takes a third of
    the time of hidden x weight (scripts/bench/generate.py). One column alone would fall back to a
    matrix-vector product on a single thread, hence two.
    """
    if hidden_NH.device.type != "cpu" or weight_RH.dtype != torch.float32:
        return (hidden_NH @ weight_RH.t()).float()
    count = len(hidden_NH)
    columns_HN = (hidden_NH.repeat(2, 1) if count == 1 else hidden_NH).t()
    return (weight_RH @ columns_HN).t()[:count].contiguous()
