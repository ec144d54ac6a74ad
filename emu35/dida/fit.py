"""The metric path's two numbers, fitted to a codebook so that noise goes evenly over time.

How far a corrupted code is from its original, E[d(x_t, x1)], should fall as linearly in t as it
can: then equal steps of denoising do equal work, and no time of training is spent where nothing
happens. Which c and alpha do that depends on the codebook. With c = 3 and alpha = 0.9 a codebook of
131,072 random directions is noise until t = 0.6 and all but clean at 0.75, since so many codes far
away outweigh a single near one until beta is large.

Time enters through beta_t alone, so the mean distance is tabulated once as a function of beta, and
trying a pair of numbers costs an interpolation: the search is a grid that closes in, with no need
of a gradient. What is reported is computed anew, at the betas of the numbers as they are printed.

Suffixes beside the package's: N codes of the sample, P values of beta, T times.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from emu35.config.dida import PathConfig
from emu35.dida.path import MetricPath
from emu35.errors import DataError

INTERVALS = 32
"""Times at which the curve is compared with the line: the 31 between 0 and 1, equally spaced."""

SCORES = 1 << 20
"""Distances held at once; few enough to stay in the cache while every beta passes over them."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeSample:
    """Codes x1 over which means are taken: int64 [N], with weights fp64 [N] that sum to 1."""

    codes_N: torch.Tensor
    weights_N: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PathCurve:
    """A metric path over time.

    Attributes:
        c, alpha: its numbers.
        times, distance, unchanged: [T] from 0 to 1; E[d(x_t, x1)] as a share of that at time 0, and
            the probability that x_t is x1.
        deviation: mean over the times between the ends of |distance - (1 - t)|.
    """

    c: float
    alpha: float
    times: list[float]
    distance: list[float]
    unchanged: list[float]
    deviation: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PathFit:
    """The path of the usual numbers beside that of the fitted ones, over ``codes`` codes."""

    usual: PathCurve
    fitted: PathCurve
    codes: int


def fit_path(codebook_KD: torch.Tensor, *, sample: CodeSample) -> PathFit:
    """The numbers, in four significant digits, whose path deviates least from the line; those of
    :class:`~emu35.config.dida.PathConfig` where none does better.

    Raises:
        DataError: the codes do not differ in direction.
    """
    usual = PathConfig()
    distances = _Distances(codebook_KD, sample=sample)
    log_beta_P, share_P = _tabulate(distances)
    c, alpha = _search(log_beta_P, share_P)
    before = distances.curve(c=usual.c, alpha=usual.alpha)
    after = distances.curve(c=_rounded(c), alpha=_rounded(alpha))
    return PathFit(
        usual=before,
        fitted=min(after, before, key=lambda curve: curve.deviation),
        codes=len(sample.codes_N),
    )


def sample_codes(counts_K: torch.Tensor, *, codes: int, seed: int) -> CodeSample:
    """``codes`` of those that occur, drawn in proportion to how often they do; all of them, with
    these weights, where they are no more than that. A function of the arguments alone."""
    counts_K = counts_K.double()
    occurring = counts_K.nonzero().squeeze(1)
    if len(occurring) <= codes:
        weights_N = counts_K[occurring]
        return CodeSample(codes_N=occurring, weights_N=weights_N / weights_N.sum())
    generator = torch.Generator().manual_seed(seed)
    order = occurring[torch.randperm(len(occurring), generator=generator)]
    # Equal steps over the sum of the shuffled counts: of equal ones none comes twice.
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    ends = counts_K[order].cumsum(0)
    places = (torch.arange(codes) + offset) / codes * ends[-1]
    drawn, times = order[torch.searchsorted(ends, places, right=True)].unique(return_counts=True)
    return CodeSample(codes_N=drawn, weights_N=times.double() / codes)


class _Distances:
    """Means over the sample of what the path's distribution at some beta gives."""

    def __init__(self, codebook_KD: torch.Tensor, *, sample: CodeSample) -> None:
        usual = PathConfig()
        self._path = MetricPath(codebook_KD, c=usual.c, alpha=usual.alpha)
        self._sample = sample
        self._start = float(self.means(np.zeros(1))[0][0])
        if not self._start > 0:
            raise DataError(
                f"the {len(codebook_KD)} codes do not differ in direction, so the metric path has "
                "no distances to measure; use another image tokenizer, or stage.path.kind="
                "mixture_uniform"
            )

    def means(self, beta_P: Floats) -> tuple[Floats, Floats]:
        """E[d] and the probability of x1 itself at each beta, fp64 [P]."""
        distance_P, unchanged_P = np.zeros(len(beta_P)), np.zeros(len(beta_P))
        codes_N, weights_N = self._sample.codes_N, self._sample.weights_N
        rows = max(1, SCORES // self._path.codebook_size)
        for first in range(0, len(codes_N), rows):
            part = slice(first, first + rows)
            distance_NK = self._path.distances(codes_N[part])
            weight_NK = torch.empty_like(distance_NK)
            for number, beta in enumerate(beta_P):
                # At x1 the distance is 0, so the largest weight is 1.
                torch.mul(distance_NK, -float(beta), out=weight_NK).exp_()
                total_N = weight_NK.sum(1).double()
                mean_N = torch.linalg.vecdot(weight_NK, distance_NK).double() / total_N
                distance_P[number] += float(mean_N @ weights_N[part])
                unchanged_P[number] += float(total_N.reciprocal() @ weights_N[part])
        return distance_P, unchanged_P

    def shares(self, beta_P: Floats) -> Floats:
        """E[d] as a share of that at beta 0, [P]."""
        return self.means(beta_P)[0] / self._start

    def curve(self, *, c: float, alpha: float) -> PathCurve:
        times_T = _times()
        distance_T, unchanged_T = self.means(np.exp(_log_beta(times_T, c=c, alpha=alpha)))
        share_T = distance_T / self._start
        return PathCurve(
            c=c,
            alpha=alpha,
            times=[0.0, *times_T.tolist(), 1.0],
            distance=[1.0, *share_T.tolist(), 0.0],
            unchanged=[1 / self._path.codebook_size, *unchanged_T.tolist(), 1.0],
            deviation=float(np.abs(share_T - (1 - times_T)).mean()),
        )


def _times() -> Floats:
    return np.arange(1, INTERVALS) / INTERVALS


def _log_beta(times_T: Floats, *, c: float, alpha: float) -> Floats:
    return np.log(c) + alpha * np.log(times_T / (1 - times_T))


def _tabulate(distances: _Distances) -> tuple[Floats, Floats]:
    """Log beta, ascending, and the share of the distance that is left there, both [P]: a few points
    over nine decades, and many where it falls."""
    wide_P = np.geomspace(1e-3, 1e6, 46)
    share_P = distances.shares(wide_P)
    # Shares fall with beta, so these are the last before the fall and the first behind it.
    first = max(0, int((share_P > 0.998).sum()) - 1)
    last = min(len(wide_P) - 1, int((share_P > 0.002).sum()))
    close_P = np.geomspace(wide_P[first], wide_P[last], 66)[1:-1]
    beta_P = np.concatenate([wide_P, close_P])
    shares_P = np.concatenate([share_P, distances.shares(close_P)])
    order = beta_P.argsort(kind="stable")
    return np.log(beta_P[order]), shares_P[order]


def _search(log_beta_P: Floats, share_P: Floats) -> tuple[float, float]:
    """c and alpha of the least mean deviation from the line."""
    times_T = _times()
    logit_T = np.log(times_T / (1 - times_T))

    def best_of(log_c: Floats, log_alpha: Floats) -> tuple[float, float]:
        beta_CAT = log_c[:, None, None] + np.exp(log_alpha)[None, :, None] * logit_T
        found_CAT = np.interp(beta_CAT, log_beta_P, share_P)
        deviation_CA = np.abs(found_CAT - (1 - times_T)).mean(-1)
        row, column = np.unravel_index(deviation_CA.argmin(), deviation_CA.shape)
        return float(log_c[row]), float(log_alpha[column])

    # c is beta at time 1/2, where half of the distance is to be left.
    half = log_beta_P[np.abs(share_P - 0.5).argmin()]
    reach = np.linspace(-2, 2, 41)
    log_c, log_alpha = best_of(half + reach, np.log(np.geomspace(0.02, 5, 81)))
    step = 0.1
    while step > 1e-5:
        # Wider than the last step, for the valley runs across both axes.
        around = step * np.linspace(-1, 1, 11)
        log_c, log_alpha = best_of(log_c + around, log_alpha + around)
        step /= 2
    return float(np.exp(log_c)), float(np.exp(log_alpha))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
