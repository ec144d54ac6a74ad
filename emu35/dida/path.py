"""Probability paths from noise to a picture's codes: exact distributions, draws, and jumps.

Time 0 is noise and time 1 the code x1. All three paths (:class:`~emu35.config.dida.PathKind`) are
defined code by code, by p_t(x | x1):

=================  =============================================================================
metric             softmax over x of -beta_t d(x, x1), beta_t = c (t / (1 - t))^alpha, where d is
                   the squared distance of the codes' embeddings, each scaled to length 1
mixture_uniform    t [x = x1] + (1 - t) / K
absorbing          t [x = x1] + (1 - t) [x = mask]
=================  =============================================================================

A *state* is a code, 0 to K - 1, or ``mask``, which is K. :meth:`Path.jump` moves states from one
time to a later one so that their distribution follows the path: by the kinetic-optimal velocity for
``metric`` (URSA, arXiv 2510.24717; Shaul et al., arXiv 2412.03487), by the only possible jump, to
x1, for the other two. Draws are Gumbel maxima of noise that depends on seed, position and code
alone, so what is drawn together, and how many ranks share the codebook, matters no more than the
last bit of a distance.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F

from emu35.config.dida import PathConfig, PathKind
from emu35.parallel.noise import gumbel, uniform

SCORES = 1 << 22
"""Scores (tokens x codes) computed at once. Their noise is made of several tensors of 64 bits as
large, so this is a few hundred MiB at most."""


class Path(ABC):
    """``codebook_size`` is K; ``states`` are K, or K + 1 with the mask."""

    def __init__(self, *, codebook_size: int, masked: bool = False) -> None:
        self.codebook_size = codebook_size
        self.mask = codebook_size if masked else None

    @property
    def states(self) -> int:
        return self.codebook_size + (self.mask is not None)

    @abstractmethod
    def probabilities(self, codes_N: torch.Tensor, *, times_N: torch.Tensor) -> torch.Tensor:
        """p_t(. | x1), [N, states]: the definition, for few tokens."""

    @abstractmethod
    def draw(
        self,
        codes_N: torch.Tensor,
        *,
        times_N: torch.Tensor,
        seeds_N: torch.Tensor,
        positions_N: torch.Tensor,
    ) -> torch.Tensor:
        """States int64 [N] from p_t(. | x1) of ``codes_N``; seeds and positions number the draws.
        On several ranks of a vocabulary group, the same on all of them."""

    @abstractmethod
    def jump(
        self,
        states_N: torch.Tensor,
        *,
        codes_N: torch.Tensor,
        times_N: torch.Tensor,
        next_N: torch.Tensor,
        seeds_N: torch.Tensor,
        positions_N: torch.Tensor,
    ) -> torch.Tensor:
        """One Euler step: ``states_N`` of time ``times_N`` moved to time ``next_N`` (at most 1),
        where ``codes_N`` are the x1 predicted for them. At time 1 they are ``codes_N``."""


class MetricPath(Path):
    """The metric path of a codebook.

    Args:
        codebook_KD: embeddings of the codes; kept in fp32, scaled to length 1, on their device.
        c, alpha: beta_t = c (t / (1 - t))^alpha.
        group: ranks that share the work of :meth:`draw`, each for its part of the codes; all of
            them hold the whole codebook and are asked the same.
    """

    def __init__(
        self,
        codebook_KD: torch.Tensor,
        *,
        c: float,
        alpha: float,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(codebook_size=len(codebook_KD))
        self._unit_KD = F.normalize(codebook_KD.detach().float(), dim=1)
        self._c, self._alpha, self._group = c, alpha, group
        ranks = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        share = -(-self.codebook_size // ranks)
        self._own = range(
            min(rank * share, self.codebook_size), min((rank + 1) * share, self.codebook_size)
        )

    def beta(self, times_N: torch.Tensor) -> torch.Tensor:
        """Sharpness fp32 [N] at times in [0, 1)."""
        times_N = times_N.double()
        return (self._c * (times_N / (1 - times_N)) ** self._alpha).float()

    def distances(self, codes_N: torch.Tensor, *, to: range | None = None) -> torch.Tensor:
        """d(x, x1) in [0, 4], fp32 [N, len(to)], from each of ``codes_N`` to codes ``to`` (all)."""
        to = to or range(self.codebook_size)
        unit_ND = self._unit_KD[codes_N]
        cosine_NK = unit_ND @ self._unit_KD[to.start : to.stop].t()
        distance_NK = cosine_NK.mul_(-2).add_(2).clamp_(min=0)
        # Rounding must not move a code away from itself: at late times beta is in the thousands.
        held = (codes_N >= to.start) & (codes_N < to.stop)
        rows = held.nonzero().squeeze(1)
        distance_NK[rows, codes_N[rows] - to.start] = 0.0
        return distance_NK

    def probabilities(self, codes_N: torch.Tensor, *, times_N: torch.Tensor) -> torch.Tensor:
        """As of :class:`Path`."""
        return torch.softmax(-self.beta(times_N)[:, None] * self.distances(codes_N), 1)

    def draw(
        self,
        codes_N: torch.Tensor,
        *,
        times_N: torch.Tensor,
        seeds_N: torch.Tensor,
        positions_N: torch.Tensor,
    ) -> torch.Tensor:
        """As of :class:`Path`."""
        beta_N = self.beta(times_N)
        best_N = torch.full_like(beta_N, -torch.inf)
        drawn_N = torch.full_like(codes_N, self.codebook_size)
        if self._own:
            ids_1K = torch.arange(self._own.start, self._own.stop, device=codes_N.device)[None]
            for part in _parts(len(codes_N), width=len(self._own)):
                scores_CK = self.distances(codes_N[part], to=self._own)
                scores_CK.mul_(-beta_N[part, None])
                scores_CK += gumbel(seeds_N[part], positions_N=positions_N[part], ids_NM=ids_1K)
                best_N[part], drawn_N[part] = scores_CK.max(1)
            drawn_N += self._own.start
        return drawn_N if self._group is None else self._best(best_N, drawn_N)

    def _best(self, best_N: torch.Tensor, drawn_N: torch.Tensor) -> torch.Tensor:
        """The code of the largest score on any rank; the lowest one of equals."""
        whole_N = best_N.clone()
        dist.all_reduce(whole_N, op=dist.ReduceOp.MAX, group=self._group)
        drawn_N = torch.where(best_N == whole_N, drawn_N, self.codebook_size)
        dist.all_reduce(drawn_N, op=dist.ReduceOp.MIN, group=self._group)
        return drawn_N

    def jump(
        self,
        states_N: torch.Tensor,
        *,
        codes_N: torch.Tensor,
        times_N: torch.Tensor,
        next_N: torch.Tensor,
        seeds_N: torch.Tensor,
        positions_N: torch.Tensor,
    ) -> torch.Tensor:
        """As of :class:`Path`: towards nearer codes alone, at the rate
        p_t(x | x1) beta'_t max(0, d(x_t, x1) - d(x, x1)). Of its factors beta' alone is integrated
        over the step: it is infinite at time 0 where alpha < 1."""
        moved_N = codes_N.clone()
        ids_1K = torch.arange(self.codebook_size, device=codes_N.device)[None]
        beta_N = self.beta(times_N)
        grown_N = self.beta(torch.where(next_N < 1, next_N, times_N)) - beta_N
        for part in _parts(len(codes_N), width=self.codebook_size):
            distance_CK = self.distances(codes_N[part])
            here_C1 = distance_CK.gather(1, states_N[part, None])
            rate_CK = torch.softmax(-beta_N[part, None] * distance_CK, 1)
            rate_CK *= grown_N[part, None] * (here_C1 - distance_CK).clamp(min=0)
            jumps_C = _happens(
                -torch.expm1(-rate_CK.sum(1).double()),
                seeds_N=seeds_N[part],
                positions_N=positions_N[part],
                number=self.codebook_size,
            )
            noise_CK = gumbel(seeds_N[part], positions_N=positions_N[part], ids_NM=ids_1K)
            target_C = (rate_CK.log() + noise_CK).argmax(1)
            moved_N[part] = torch.where(jumps_C, target_C, states_N[part])
        return torch.where(next_N < 1, moved_N, codes_N)


class MixturePath(Path):
    """The code itself with probability t; otherwise any code alike, or the mask (``masked``)."""

    def probabilities(self, codes_N: torch.Tensor, *, times_N: torch.Tensor) -> torch.Tensor:
        """As of :class:`Path`."""
        kept_N1 = times_N.float()[:, None]
        found_NK = kept_N1.new_zeros(len(codes_N), self.states)
        if self.mask is None:
            found_NK += (1 - kept_N1) / self.codebook_size
        else:
            found_NK[:, self.mask] = 1 - kept_N1[:, 0]
        return found_NK.scatter_add_(1, codes_N[:, None], kept_N1)

    def draw(
        self,
        codes_N: torch.Tensor,
        *,
        times_N: torch.Tensor,
        seeds_N: torch.Tensor,
        positions_N: torch.Tensor,
    ) -> torch.Tensor:
        """As of :class:`Path`."""
        kept_N = _happens(times_N, seeds_N=seeds_N, positions_N=positions_N, number=0)
        return torch.where(
            kept_N, codes_N, self._noise(codes_N, seeds_N=seeds_N, positions_N=positions_N)
        )

    def _noise(
        self, codes_N: torch.Tensor, *, seeds_N: torch.Tensor, positions_N: torch.Tensor
    ) -> torch.Tensor:
        if self.mask is not None:
            return torch.full_like(codes_N, self.mask)
        one_11 = torch.ones(1, 1, dtype=torch.int64, device=codes_N.device)
        noise_N1 = uniform(seeds_N, positions_N=positions_N, ids_NM=one_11)
        return (noise_N1[:, 0] * self.codebook_size).long()

    def jump(
        self,
        states_N: torch.Tensor,
        *,
        codes_N: torch.Tensor,
        times_N: torch.Tensor,
        next_N: torch.Tensor,
        seeds_N: torch.Tensor,
        positions_N: torch.Tensor,
    ) -> torch.Tensor:
        """As of :class:`Path`. The rate of the jump to x1 is 1 / (1 - t), whose integral is known:
        (next - t) / (1 - t) of the tokens jump, without an error of the step's size."""
        share_N = (next_N - times_N).double() / (1 - times_N.double())
        jumps_N = _happens(share_N, seeds_N=seeds_N, positions_N=positions_N, number=0)
        return torch.where(jumps_N | (next_N >= 1), codes_N, states_N)


def build_path(
    config: PathConfig, *, codebook_KD: torch.Tensor, group: dist.ProcessGroup | None = None
) -> Path:
    """The path that ``config`` describes, over the codes of ``codebook_KD``; see
    :class:`MetricPath` for ``group``."""
    if config.kind is PathKind.metric:
        return MetricPath(codebook_KD, c=config.c, alpha=config.alpha, group=group)
    return MixturePath(codebook_size=len(codebook_KD), masked=config.kind is PathKind.absorbing)


def _happens(
    probability_N: torch.Tensor,
    *,
    seeds_N: torch.Tensor,
    positions_N: torch.Tensor,
    number: int,
) -> torch.Tensor:
    """Events of the given probabilities, bool [N]."""
    ids_11 = torch.full((1, 1), number, dtype=torch.int64, device=probability_N.device)
    return uniform(seeds_N, positions_N=positions_N, ids_NM=ids_11)[:, 0] < probability_N


def _parts(count: int, *, width: int) -> Iterator[slice]:
    """Slices of ``count`` tokens, so few that their scores against ``width`` codes stay small."""
    rows = max(1, SCORES // width)
    for start in range(0, count, rows):
        yield slice(start, start + rows)
