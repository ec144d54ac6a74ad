"""How likely chosen tokens are under the policy that chose them, replayed with gradients.

A sampler draws a token from a part of the vocabulary (what the grammar permits, and of that what
top-k and top-p leave) after guidance and temperature. Reinforcement learning needs the logarithm of
that very probability for the weights of now, over the same part: scored over the whole vocabulary
instead, a token that was forced would look like a choice, and one of five thousand candidates like
one of two hundred thousand. It also needs the model's own, unfiltered log-probability, for the
divergence to a reference, and the entropy of the choice.

All three come from one projection of a hidden row (two with guidance), a chunk of rows at a time.
Nothing as wide as the vocabulary is kept: the backward pass projects again. Under tensor
parallelism each rank holds a part of the vocabulary, and maxima and sums are combined.

Suffixes: N chosen tokens, C of them in a chunk, R vocabulary rows of this rank, H hidden size, F
candidates of all tokens laid end to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from emu35.model.logits import Rows, Space, own_rows
from emu35.model.transformer import Emu35Model

LegalSet: TypeAlias = tuple[tuple[int, int], ...]
"""Half-open ranges of ids, ascending, as :class:`emu35.inference.grammar.Next` has them."""


@dataclass(kw_only=True, slots=True)
class Choices:
    """N tokens and what each was chosen from.

    Attributes:
        ids_N: int64.
        temperature_N: fp32, positive.
        sets: the legal sets that occur; ``legal_N`` (int64) says which is whose.
        candidates_F: ids that top-k and top-p left, token by token; ``ends_N`` (int64) is where
            those of each token end. A token with none was chosen from its whole legal set.
    """

    ids_N: torch.Tensor
    temperature_N: torch.Tensor
    sets: Sequence[LegalSet]
    legal_N: torch.Tensor
    candidates_F: torch.Tensor
    ends_N: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids_N)

    def part(self, start: int, end: int) -> "Choices":
        """Tokens ``start`` to ``end``."""
        first = int(self.ends_N[start - 1]) if start else 0
        last = int(self.ends_N[end - 1]) if end else 0
        return Choices(
            ids_N=self.ids_N[start:end],
            temperature_N=self.temperature_N[start:end],
            sets=self.sets,
            legal_N=self.legal_N[start:end],
            candidates_F=self.candidates_F[first:last],
            ends_N=self.ends_N[start:end] - first,
        )


@dataclass(kw_only=True, slots=True)
class PolicyLogprobs:
    """Of N tokens, fp32 [N] each and differentiable: ``chosen_N``, the log-probability under the
    behaviour policy; ``plain_N``, that under the model's own distribution over the vocabulary
    (without guidance); ``entropy_N``, of the behaviour policy's choice (nats)."""

    chosen_N: torch.Tensor
    plain_N: torch.Tensor
    entropy_N: torch.Tensor


def policy_logprobs(
    model: Emu35Model,
    *,
    hidden_NH: torch.Tensor,
    choices: Choices,
    guided_NH: torch.Tensor | None = None,
    chunk: int = 1024,
) -> PolicyLogprobs:
    """Replay ``choices`` from the hidden states that they were predicted from.

    Args:
        model: its ``output_layer`` is the projection; last pipeline stage only.
        hidden_NH: rows of :func:`emu35.model.logits.hidden_for_projection`, whose gradient is
            summed over tensor-parallel ranks there.
        guided_NH: the guided hidden states, from which the choices were made; None: ``hidden_NH``.
        chunk: rows projected at a time.
    """
    chosen_N, plain_N, entropy_N = _Replay.apply(  # type: ignore[misc]
        hidden_NH, guided_NH, model.output_weight, choices, own_rows(model), chunk
    )
    return PolicyLogprobs(chosen_N=chosen_N, plain_N=plain_N, entropy_N=entropy_N)


class _Replay(torch.autograd.Function):
    """Projection, restriction and log-softmax, chunked over tokens; projected again backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        guided_NH: torch.Tensor | None,
        weight_VH: torch.Tensor,
        choices: Choices,
        rows: Rows,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        results = [hidden_NH.new_empty(len(choices), dtype=torch.float32) for _ in range(3)]
        weight_RH = weight_VH[: rows.count]
        space = Space.of(min(chunk, len(choices)), weight_RH=weight_RH)
        for start in range(0, len(choices), chunk):
            part = choices.part(start, min(start + chunk, len(choices)))
            here = slice(start, start + chunk)
            logits_CR = space.project(hidden_NH[here], weight_RH=weight_RH)
            plain = _log_softmax(logits_CR, ids_C=part.ids_N, rows=rows)
            results[1][here] = plain.chosen_C
            if guided_NH is not None:
                logits_CR = space.project(guided_NH[here], weight_RH=weight_RH)
            scores_CR = _restricted(logits_CR, choices=part, rows=rows)
            found = _log_softmax(scores_CR, ids_C=part.ids_N, rows=rows)
            results[0][here] = found.chosen_C
            results[2][here] = _entropy(found, rows=rows)
        ctx.save_for_backward(hidden_NH, guided_NH, weight_VH)
        ctx.choices, ctx.rows, ctx.chunk = choices, rows, chunk
        return results[0], results[1], results[2]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, guided_NH, weight_VH = ctx.saved_tensors
        choices, rows, chunk = ctx.choices, ctx.rows, ctx.chunk
        grad_chosen_N, grad_plain_N, grad_entropy_N = grads
        weight_RH = weight_VH[: rows.count]
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_guided_NH = None if guided_NH is None else torch.empty_like(guided_NH)
        trained = ctx.needs_input_grad[2]
        # fp32, for the sum over chunks must not be rounded to bf16 at every step.
        grad_weight_VH = torch.zeros_like(
            weight_VH if trained else weight_VH[:0], dtype=torch.float32
        )
        space = Space.of(min(chunk, len(choices)), weight_RH=weight_RH)
        for start in range(0, len(choices), chunk):
            part = choices.part(start, min(start + chunk, len(choices)))
            here = slice(start, start + chunk)
            hidden_CH = hidden_NH[here]
            logits_CR = space.project(hidden_CH, weight_RH=weight_RH)
            grad_CR = _plain_gradient(logits_CR, choices=part, rows=rows, grad_C=grad_plain_N[here])
            if guided_NH is not None:
                sums = _Products(weight_RH=weight_RH, grad_weight_RH=grad_weight_VH[: rows.count])
                grad_hidden_NH[here] = sums.add(grad_CR, hidden_CH=hidden_CH, trained=trained)
                hidden_CH, grad_CR = guided_NH[here], None
                logits_CR = space.project(hidden_CH, weight_RH=weight_RH)
            restricted_CR = _choice_gradient(
                logits_CR,
                choices=part,
                rows=rows,
                grad_C=grad_chosen_N[here],
                grad_entropy_C=grad_entropy_N[here],
            )
            total_CR = restricted_CR if grad_CR is None else restricted_CR.add_(grad_CR)
            sums = _Products(weight_RH=weight_RH, grad_weight_RH=grad_weight_VH[: rows.count])
            grad = sums.add(total_CR, hidden_CH=hidden_CH, trained=trained)
            (grad_hidden_NH if grad_guided_NH is None else grad_guided_NH)[here] = grad
        grad_weight = grad_weight_VH.to(weight_VH.dtype) if trained else None
        return grad_hidden_NH, grad_guided_NH, grad_weight, None, None, None


@dataclass(kw_only=True, slots=True, frozen=True)
class _Products:
    """The two matrix products of a gradient of logits."""

    weight_RH: torch.Tensor
    grad_weight_RH: torch.Tensor

    def add(self, grad_CR: torch.Tensor, *, hidden_CH: torch.Tensor, trained: bool) -> torch.Tensor:
        """The gradient of the hidden rows; that of the weights is added to the sum."""
        narrow_CR = grad_CR.to(self.weight_RH.dtype)
        if trained:
            self.grad_weight_RH.add_(narrow_CR.t() @ hidden_CH)
        return narrow_CR @ self.weight_RH


@dataclass(kw_only=True, slots=True, frozen=True)
class _Distribution:
    """Scores shifted by their highest [C, R] (those out of question at -inf), the logarithm of the
    sum of their exponentials [C], the log-probability of the chosen id [C], and its place among
    this rank's rows [C], -1 where another rank holds it."""

    shifted_CR: torch.Tensor
    log_sum_C: torch.Tensor
    chosen_C: torch.Tensor
    local_C: torch.Tensor

    @property
    def log_probabilities_CR(self) -> torch.Tensor:
        return self.shifted_CR - self.log_sum_C[:, None]


def _log_softmax(scores_CR: torch.Tensor, *, ids_C: torch.Tensor, rows: Rows) -> _Distribution:
    highest_C = scores_CR.amax(1)
    if rows.group is not None:
        dist.all_reduce(highest_C, op=dist.ReduceOp.MAX, group=rows.group)
    shifted_CR = scores_CR - highest_C[:, None]
    inside_C = (ids_C >= rows.start) & (ids_C < rows.start + rows.count)
    local_C = torch.where(inside_C, ids_C - rows.start, -1)
    chosen_C = shifted_CR.gather(1, local_C.clamp(min=0)[:, None]).squeeze(1)
    both_2C = torch.stack([chosen_C.masked_fill(~inside_C, 0.0), shifted_CR.exp().sum(1)])
    if rows.group is not None:
        dist.all_reduce(both_2C, group=rows.group)
    log_sum_C = both_2C[1].log()
    return _Distribution(
        shifted_CR=shifted_CR,
        log_sum_C=log_sum_C,
        chosen_C=both_2C[0] - log_sum_C,
        local_C=local_C,
    )


def _restricted(logits_CR: torch.Tensor, *, choices: Choices, rows: Rows) -> torch.Tensor:
    """The scores that the sampler drew from: over the temperature, -inf for every id that was no
    candidate. In place."""
    scores_CR = logits_CR.div_(choices.temperature_N[:, None])
    width = scores_CR.shape[1]
    for number in choices.legal_N.unique().tolist():
        of_set_C = (choices.legal_N == number).nonzero().squeeze(1)
        begin = 0
        for start, end in (*choices.sets[number], (rows.start + rows.count, 1 << 62)):
            gap = min(max(start - rows.start, 0), width)
            if begin < gap:
                scores_CR[of_set_C, begin:gap] = -torch.inf
            begin = max(begin, min(max(end - rows.start, 0), width))
    if len(choices.candidates_F):
        counts_C = choices.ends_N.diff(prepend=choices.ends_N.new_zeros(1))
        row_F = torch.arange(len(choices), device=scores_CR.device).repeat_interleave(counts_C)
        local_F = choices.candidates_F - rows.start
        held_F = (local_F >= 0) & (local_F < width)
        out_CR = (counts_C > 0)[:, None].expand(-1, width).clone()
        out_CR[row_F[held_F], local_F[held_F]] = False
        scores_CR.masked_fill_(out_CR, -torch.inf)
    return scores_CR


def _entropy(found: _Distribution, *, rows: Rows) -> torch.Tensor:
    """-sum p log p, fp32 [C]."""
    logs_CR = found.log_probabilities_CR
    # 0 log 0 is 0, not a number times infinity.
    total_C = -(logs_CR.exp() * logs_CR.clamp(min=torch.finfo(logs_CR.dtype).min)).sum(1)
    if rows.group is not None:
        dist.all_reduce(total_C, group=rows.group)
    return total_C


def _plain_gradient(
    logits_CR: torch.Tensor, *, choices: Choices, rows: Rows, grad_C: torch.Tensor
) -> torch.Tensor:
    found = _log_softmax(logits_CR, ids_C=choices.ids_N, rows=rows)
    return _onehot_minus_softmax(found, grad_C=grad_C)


def _choice_gradient(
    logits_CR: torch.Tensor,
    *,
    choices: Choices,
    rows: Rows,
    grad_C: torch.Tensor,
    grad_entropy_C: torch.Tensor,
) -> torch.Tensor:
    """Of the chosen log-probability and the entropy, with respect to the logits."""
    scores_CR = _restricted(logits_CR, choices=choices, rows=rows)
    found = _log_softmax(scores_CR, ids_C=choices.ids_N, rows=rows)
    grad_CR = _onehot_minus_softmax(found, grad_C=grad_C)
    if bool(grad_entropy_C.any()):
        # dH/ds = -p (log p + H)
        entropy_C = _entropy(found, rows=rows)
        logs_CR = found.log_probabilities_CR
        slope_CR = logs_CR.exp() * (
            logs_CR.clamp(min=torch.finfo(logs_CR.dtype).min) + entropy_C[:, None]
        )
        grad_CR -= slope_CR * grad_entropy_C[:, None]
    return grad_CR / choices.temperature_N[:, None]


def _onehot_minus_softmax(found: _Distribution, *, grad_C: torch.Tensor) -> torch.Tensor:
    grad_CR = found.log_probabilities_CR.exp() * -grad_C[:, None]
    held_C = (found.local_C >= 0).nonzero().squeeze(1)
    grad_CR[held_C, found.local_C[held_C]] += grad_C[held_C]
    return grad_CR
