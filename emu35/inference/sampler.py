"""From logits to tokens: guidance, mask, temperature, top-k, top-p, draw, in this order.

The mask is a slice: legal sets are ranges of ids, so callers hand over only the legal columns.
Guidance is defined on log-probabilities over the whole vocabulary (:func:`guide`, the oracle), but
the two normalisers shift every candidate of a row alike, which changes neither the order nor the
softmax of what remains, nor top-k, top-p and the log-probabilities of the choice. The engine
therefore guides logits, or rather the hidden states that they are a linear function of
(:mod:`emu35.inference.choose`), and computes no normaliser at all.

Randomness is a pure function of (seed, position, id), see :mod:`emu35.parallel.noise`: no generator
has a state that a preempted request could lose, and what shares the batch does not matter.

Suffixes: N rows sampled together, V columns (ids) of a slice, M columns still in question, T the
best of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emu35.errors import CheckpointError
from emu35.parallel.noise import gumbel
from emu35.tokens.template import Sampling

EVERYTHING = Sampling(temperature=1.0, top_k=0, top_p=1.0)
"""The model's own distribution. ``top_k`` 0 and ``top_p`` 1 keep all; temperature 0 is greedy."""

COLDEST, HOTTEST = 1e-3, 1e3
"""Temperatures beyond these leave the range of fp32 scores, or of what makes a difference."""


def sampling_problems(sampling: Sampling, *, name: str) -> list[str]:
    """Every number of ``sampling`` that makes no sense, as sentences."""
    found: list[str] = []
    if sampling.temperature != 0 and not COLDEST <= sampling.temperature <= HOTTEST:
        found.append(
            f"{name} temperature {sampling.temperature} must be 0 (greedy) or lie in "
            f"[{COLDEST:g}, {HOTTEST:g}]"
        )
    if sampling.top_k < 0:
        found.append(f"{name} top-k {sampling.top_k} must be 0 (all) or positive")
    if not 0 < sampling.top_p <= 1:
        found.append(f"{name} top-p {sampling.top_p} must lie in (0, 1]")
    return found


def guide(
    conditional_NV: torch.Tensor, *, unconditional_NV: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """Classifier-free guidance u + scale * (c - u) of fp32 log-probabilities over the whole
    vocabulary. ``scale``: a number, or one a row of shape [N, 1]."""
    conditional_NV = torch.log_softmax(conditional_NV.float(), -1)
    unconditional_NV = torch.log_softmax(unconditional_NV.float(), -1)
    return unconditional_NV + scale * (conditional_NV - unconditional_NV)


def guide_hidden(
    conditional_NH: torch.Tensor, *, unconditional_NH: torch.Tensor, scale_N1: torch.Tensor
) -> torch.Tensor:
    """The same of hidden states that logits are a linear function of: u + scale * (c - u), computed
    in fp32, in their own type. ``scale_N1``: fp32 [N, 1], or [1, 1] for all."""
    unconditional = unconditional_NH.float()
    difference_NH = conditional_NH.float() - unconditional
    return torch.addcmul(unconditional, scale_N1, difference_NH).to(conditional_NH.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """The choice of every row: its column int64 [N], its log-probability fp32 [N] under the
    distribution it was drawn from, how many candidates that had, int64 [N], and the columns and
    log-probabilities of the best, [N, T]. ``kept`` are, where asked for, the columns of the
    candidates of each row, ascending, int64; None for rows where everything legal was one."""

    columns_N: torch.Tensor
    logprobs_N: torch.Tensor
    support_N: torch.Tensor
    top_columns_NT: torch.Tensor
    top_logprobs_NT: torch.Tensor
    kept: Sequence[torch.Tensor | None] = ()


def restrict(scores_NV: torch.Tensor, *, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply temperature, top-k and top-p; ties with the last candidate of either are kept, so that
    what remains depends on the scores alone.

    Returns:
        scores [N, M], -inf where a candidate is out, and the column of each, int64 [N, M]. M is
        the largest number of candidates of any row, so that a later sort or draw is small.
    """
    assert sampling.temperature > 0, "greedy rows are not restricted"
    if sampling.temperature != 1.0:
        scores_NV = scores_NV / sampling.temperature
    width = scores_NV.shape[-1]
    nucleus = sampling.top_p < 1.0
    if 0 < sampling.top_k < width:
        best_NK, columns_NK = scores_NV.topk(sampling.top_k, sorted=nucleus)
        threshold_N1 = best_NK.amin(-1, keepdim=True)
        most = int((scores_NV >= threshold_N1).sum(-1).max())
        # Usually nothing ties with the k-th score and this is topk's own answer.
        best_NM, columns_NM = (
            scores_NV.topk(most, sorted=nucleus) if most > sampling.top_k else (best_NK, columns_NK)
        )
        best_NM = best_NM.masked_fill(best_NM < threshold_N1, -torch.inf)
    elif nucleus:
        best_NM, columns_NM = scores_NV.sort(-1, descending=True)
    else:
        return scores_NV, torch.arange(width, device=scores_NV.device).expand_as(scores_NV)
    if nucleus:
        # A candidate stays while those before it have not yet gathered top_p, so the one that
        # crosses the line stays too and at least one always does.
        gathered_NM = torch.softmax(best_NM, -1).cumsum(-1)
        beyond_NM = gathered_NM.roll(1, -1) > sampling.top_p
        beyond_NM[:, 0] = False
        last_N1 = best_NM.masked_fill(beyond_NM, torch.inf).amin(-1, keepdim=True)
        best_NM = best_NM.masked_fill(best_NM < last_N1, -torch.inf)
    return best_NM, columns_NM


def draw(
    scores_NV: torch.Tensor,
    *,
    sampling: Sampling,
    seeds_N: torch.Tensor,
    positions_N: torch.Tensor,
    ids: Sequence[int] = range(1 << 62),
    top: int = 0,
    keep: bool = False,
) -> Drawn:
    """One column a row, drawn with probability softmax(restricted scores); -inf marks columns that
    are not legal.

    Every candidate gets Gumbel noise, and the largest sum wins. The noise of a column depends on
    the row's seed and position and on the column's id, not on the order of the scores, nor on
    which other ids are legal, nor on other rows; unlike inverting a cumulative sum, the outcome is
    insensitive to the last bits of the logits, and batched equals single.

    Args:
        seeds_N: int64 [N].
        positions_N: int64 [N], how many tokens of the sequence were drawn or forced before.
        ids: the id of every column; its number by default.
        top: how many of the best candidates to report.
        keep: whether to report all candidates, where they are fewer than the legal ids.

    Raises:
        CheckpointError: if a row holds NaN or has no finite score: the weights have diverged.
    """
    best_N = scores_NV.amax(-1)
    sound_N = torch.isfinite(best_N)
    if not bool(sound_N.all()):
        raise CheckpointError(
            f"the model's logits are not finite (largest score {best_N[~sound_N].tolist()[0]}); "
            "its weights have diverged or overflow in this precision: use an earlier checkpoint"
        )
    if sampling.temperature == 0:
        winner_N1 = scores_NV.argmax(-1, keepdim=True)
        scores_NM, columns_NM = scores_NV, None
        support_N = torch.ones_like(winner_N1[:, 0])
    else:
        scores_NM, columns_NM = restrict(scores_NV, sampling=sampling)
        ids_NM = (
            columns_NM + ids.start
            if isinstance(ids, range)
            else torch.tensor(ids, device=columns_NM.device)[columns_NM]
        )
        noise_NM = gumbel(seeds_N, positions_N=positions_N, ids_NM=ids_NM)
        winner_N1 = (scores_NM + noise_NM).argmax(-1, keepdim=True)
        support_N = torch.isfinite(scores_NM).sum(-1)
    total_N1 = scores_NM.logsumexp(-1, keepdim=True)
    kept: list[torch.Tensor | None] = []
    if keep:
        kept = _kept(scores_NM, columns_NM=columns_NM, legal_N=torch.isfinite(scores_NV).sum(-1))
    best_NT, places_NT = scores_NM.topk(min(top, scores_NM.shape[-1]))
    return Drawn(
        columns_N=(winner_N1 if columns_NM is None else columns_NM.gather(1, winner_N1))[:, 0],
        logprobs_N=(scores_NM.gather(1, winner_N1) - total_N1)[:, 0],
        support_N=support_N,
        top_columns_NT=places_NT if columns_NM is None else columns_NM.gather(1, places_NT),
        top_logprobs_NT=best_NT - total_N1,
        kept=kept,
    )


def _kept(
    scores_NM: torch.Tensor, *, columns_NM: torch.Tensor | None, legal_N: torch.Tensor
) -> list[torch.Tensor | None]:
    """The columns of each row's candidates, ascending; None where all that is legal is one."""
    if columns_NM is None:  # greedy: reported over the whole legal set
        return [None] * len(scores_NM)
    finite_NM = torch.isfinite(scores_NM)
    whole_N = (finite_NM.sum(-1) == legal_N).tolist()
    return [
        None if whole else columns_M[finite_M].sort().values.cpu()
        for whole, columns_M, finite_M in zip(whole_N, columns_NM, finite_NM, strict=True)
    ]
