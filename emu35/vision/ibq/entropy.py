"""The entropy term: every vector sure of its code, all vectors together using the whole codebook.

With q_n = softmax(L_n / temperature), where L_n are the logits of vector n::

    sample = mean_n H(q_n)      codebook = H(mean_n q_n)      loss = w_s * sample - w_b * codebook

(arXiv 2412.02692, section 3.3; temperature 0.01.) Small ``sample`` makes decisions clear, large
``codebook`` spreads them over the rows.

**Over ranks.** The codebook's entropy is at most the logarithm of the number of vectors in the mean
distribution, so that mean must span the global batch: a = mean over the R ranks of a_r, where a_r
is the mean of q over the vectors of rank r. ``sample`` is the mean of the rank's own vectors. The
loss of the whole batch is therefore::

    loss = mean_r (w_s * sample_r) - w_b * H(a)

The trainer runs backward on each rank's ``w_s * sample_r - w_b * H(a)`` and then averages the
gradients. With c = dH/da, the gradient of the whole is ``-w_b * c . (1/R) sum_r da_r``. The average
over ranks supplies both the sum and the 1/R, so each rank must contribute ``c . da_r``: its
backward pass treats da/da_r as 1 and needs no communication. A differentiable all-reduce yields the
same: it sums the R equal gradients that arrive at a, each times the 1/R of the mean. Both take for
granted that every rank gives the term the same weight. Where ranks hold different numbers of
vectors, each rank counts alike, as it does in every other term whose gradients are averaged.

**Over micro-batches.** The mean spans one micro-batch on all ranks. Micro-batches that are
accumulated each get the entropy of their own mean, and the loss is the average of those; because
entropy is concave, that average is at most the entropy of the mean over all of them. The exact term
would need the mean before the first backward pass, that is a second forward pass of the encoder for
every micro-batch. Choose micro-batches such that vectors x ranks is a good multiple of the codebook
in use.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce

from emu35.parallel.collectives import sum_over


@dataclass(kw_only=True, slots=True, frozen=True)
class EntropySettings:
    """What entropies are computed of.

    ``eps`` is added to the mean distribution within the logarithm, as in the published objective:
    it bounds the pull towards rows that no vector comes near. It lowers the value noticeably where
    the codebook has more than 1 / eps rows in use; 0 gives the exact entropy. ``group`` holds the
    ranks that share a batch; None is this rank alone.
    """

    temperature: float = 0.01
    eps: float = 1e-5
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        assert self.temperature > 0, self.temperature
        assert self.eps >= 0, self.eps


@dataclass(kw_only=True, slots=True)
class EntropyTerms:
    """Two scalars, in nats: ``sample`` over this rank's vectors, ``codebook`` over all ranks'."""

    sample: torch.Tensor
    codebook: torch.Tensor

    def loss(self, *, sample_weight: float = 1.0, codebook_weight: float = 1.0) -> torch.Tensor:
        """The term to minimise, before its weight in the objective."""
        return sample_weight * self.sample - codebook_weight * self.codebook


def entropy_plain(logits_NK: torch.Tensor, *, settings: EntropySettings) -> EntropyTerms:
    """The definition, with N x K matrices and a differentiable all-reduce: the oracle."""
    log_q_NK = (logits_NK / settings.temperature).log_softmax(dim=1)
    q_NK = log_q_NK.exp()
    mean_K = q_NK.mean(dim=0)
    if ranks_of(settings.group) > 1:
        assert settings.group is not None
        mean_K = all_reduce(mean_K, group=settings.group) / ranks_of(settings.group)
    return EntropyTerms(
        sample=-(q_NK * log_q_NK).sum(dim=1).mean(),
        codebook=-(mean_K * _log(mean_K, eps=settings.eps)).sum(),
    )


def entropy_and_slope(
    mean_K: torch.Tensor, *, settings: EntropySettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """H(a), a scalar, and c = dH/da ``[K]`` of a mean distribution, or of a part of its rows."""
    log_K = _log(mean_K, eps=settings.eps)
    inner_K = mean_K / (mean_K + settings.eps).clamp_min(torch.finfo(mean_K.dtype).tiny)
    return -(mean_K * log_K).sum(), -(log_K + inner_K)


def mean_over_ranks(values: torch.Tensor, *, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The mean over ``group``, in place and without gradient."""
    return sum_over(values, group).div_(ranks_of(group))


def most_over_ranks(number: int, *, like: torch.Tensor, group: dist.ProcessGroup | None) -> int:
    """The largest ``number`` of any rank; ``like`` lies on the device of the communication."""
    if ranks_of(group) == 1:
        return number
    most = torch.tensor(number, dtype=torch.int64, device=like.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return int(most)


def ranks_of(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _log(mean_K: torch.Tensor, *, eps: float) -> torch.Tensor:
    # Without eps, rows that no vector comes near have no logarithm; they weigh nothing anyway.
    return (mean_K + eps).clamp_min(torch.finfo(mean_K.dtype).tiny).log()
