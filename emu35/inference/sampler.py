"""From logits to tokens: guidance, mask, temperature, top-k, top-p, draw, in this order.

The mask is a slice: text and visual ids are two contiguous ranges, so callers hand over only the
legal columns (after guidance, whose log-softmax runs over the whole vocabulary).

Suffixes: N rows sampled together, V columns (ids) of a slice, M columns still in question.
"""

import math
from collections.abc import Sequence

import torch

from emu35.errors import CheckpointError
from emu35.tokens.template import Sampling

EVERYTHING = Sampling(temperature=1.0, top_k=0, top_p=1.0)
"""The model's own distribution. ``top_k`` 0 and ``top_p`` 1 keep all; temperature 0 is greedy."""


def sampling_problems(sampling: Sampling, *, name: str) -> list[str]:
    """Every number of ``sampling`` that makes no sense, as sentences."""
    found: list[str] = []
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        found.append(f"{name} temperature {sampling.temperature} must be 0 (greedy) or positive")
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


def restrict(scores_NV: torch.Tensor, *, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply temperature, top-k (ties with the k-th kept) and top-p.

    Returns:
        scores [N, M], -inf where a candidate is out, and the column of each, int64 [N, M]. M is
        the largest number of candidates of any row, so that a later sort or draw is small.
    """
    assert sampling.temperature > 0, "greedy rows are not restricted"
    if sampling.temperature != 1.0:
        scores_NV = scores_NV / sampling.temperature
    width = scores_NV.shape[-1]
    if 0 < sampling.top_k < width:
        best_NK, columns_NK = scores_NV.topk(sampling.top_k)
        threshold_N1 = best_NK[:, -1:]
        most = int((scores_NV >= threshold_N1).sum(-1).max())
        # Usually nothing ties with the k-th score and this is topk's own answer.
        best_NM, columns_NM = (
            scores_NV.topk(most) if most > sampling.top_k else (best_NK, columns_NK)
        )
        best_NM = best_NM.masked_fill(best_NM < threshold_N1, -torch.inf)
    elif sampling.top_p < 1.0:
        best_NM, columns_NM = scores_NV.sort(-1, descending=True)
    else:
        return scores_NV, torch.arange(width, device=scores_NV.device).expand_as(scores_NV)
    if sampling.top_p < 1.0:
        # A candidate stays while those before it have not yet gathered top_p, so the one that
        # crosses the line stays too and at least one always does.
        gathered_NM = torch.softmax(best_NM, -1).cumsum(-1)
        best_NM[:, 1:] = best_NM[:, 1:].masked_fill(
            gathered_NM[:, :-1] > sampling.top_p, -torch.inf
        )
    return best_NM, columns_NM


def draw(
    scores_NV: torch.Tensor, *, sampling: Sampling, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """One column a row, int64 [N], drawn with probability softmax(restricted scores).

    Each row takes V exponential variates from its own generator and the candidate with the
    smallest variate / probability wins. The noise of a column does not depend on the order of the
    scores, nor on the other rows; unlike inverting a cumulative sum, the outcome is insensitive to
    the last bits of the logits, and batched equals single.

    Raises:
        CheckpointError: if a row holds NaN or has no finite score: the weights have diverged.
    """
    best_N = scores_NV.amax(-1)
    if not bool(torch.isfinite(best_N).all()):
        raise CheckpointError(
            f"the model's logits are not finite (largest score {best_N.tolist()[0]}); "
            "its weights have diverged or overflow in this precision: use an earlier checkpoint"
        )
    if sampling.temperature == 0:
        return scores_NV.argmax(-1)
    assert len(generators) == scores_NV.shape[0]
    noise_NV = torch.empty_like(scores_NV, dtype=torch.float32)
    for row_V, generator in zip(noise_NV, generators, strict=True):
        row_V.exponential_(generator=generator)
    scores_NM, columns_NM = restrict(scores_NV, sampling=sampling)
    winner_N1 = (scores_NM - noise_NV.gather(1, columns_NM).log()).argmax(-1, keepdim=True)
    return columns_NM.gather(1, winner_N1)[:, 0]
