"""The fitted numbers make the distance fall evenly, and the curve is that of the path itself."""

import math
from itertools import pairwise

import pytest
import torch

from emu35.config import PathConfig, PathKind
from emu35.dida.fit import CodeSample, PathCurve, fit_path, sample_codes
from emu35.dida.path import MetricPath, build_path
from emu35.errors import DataError

K = 256


def codebook(*, codes: int = K, dim: int = 8, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(codes, dim, generator=torch.Generator().manual_seed(5))


def everything(codes: int = K) -> CodeSample:
    return sample_codes(torch.ones(codes), codes=codes, seed=0)


def by_brute_force(
    curve: PathCurve, *, codebook_KD: torch.Tensor, sample: CodeSample
) -> tuple[list[float], list[float]]:
    """Distance and share of unchanged codes over time, from the definition of the path."""
    config = PathConfig(kind=PathKind.metric, c=curve.c, alpha=curve.alpha)
    path = build_path(config, codebook_KD=codebook_KD)
    assert isinstance(path, MetricPath)
    codes_N, weights_N = sample.codes_N, sample.weights_N
    distance_NK = path.distances(codes_N).double()
    start = (distance_NK.mean(1) @ weights_N).item()
    distance, unchanged = [], []
    for time in curve.times[:-1]:
        times_N = torch.full((len(codes_N),), time, dtype=torch.float64)
        share_NK = path.probabilities(codes_N, times_N=times_N).double()
        distance.append(((share_NK * distance_NK).sum(1) @ weights_N).item() / start)
        unchanged.append((share_NK.gather(1, codes_N[:, None])[:, 0] @ weights_N).item())
    return [*distance, 0.0], [*unchanged, 1.0]


@pytest.mark.parametrize("sampled", [False, True])
def test_the_curves_are_those_of_the_path_with_these_numbers(sampled: bool) -> None:
    codebook_KD = codebook()
    counts_K = torch.arange(K) if sampled else torch.ones(K)
    sample = sample_codes(counts_K, codes=40, seed=3)
    fit = fit_path(codebook_KD, sample=sample)
    for curve in (fit.usual, fit.fitted):
        distance, unchanged = by_brute_force(curve, codebook_KD=codebook_KD, sample=sample)
        assert curve.distance == pytest.approx(distance, abs=1e-5)
        assert curve.unchanged == pytest.approx(unchanged, abs=1e-5)
        off = [abs(d - (1 - t)) for t, d in zip(curve.times, distance, strict=True)][1:-1]
        assert curve.deviation == pytest.approx(sum(off) / len(off), abs=1e-5)


@pytest.mark.parametrize(
    ("codes", "dim", "bound"), [(64, 8, 0.04), (256, 8, 0.04), (2048, 32, 0.06)]
)
def test_the_fit_is_nearer_to_the_line_than_the_usual_numbers(
    codes: int, dim: int, bound: float
) -> None:
    fit = fit_path(codebook(codes=codes, dim=dim), sample=everything(min(codes, 256)))
    assert (fit.usual.c, fit.usual.alpha) == (PathConfig().c, PathConfig().alpha)
    assert fit.fitted.deviation < bound
    assert fit.fitted.deviation < fit.usual.deviation / 2
    for values in (fit.fitted.distance, [-share for share in fit.fitted.unchanged]):
        assert all(late <= early for early, late in pairwise(values))


def test_no_numbers_nearby_do_better() -> None:
    codebook_KD, sample = codebook(), everything()
    fit = fit_path(codebook_KD, sample=sample)
    for c in (0.9, 1.0, 1.1):
        for alpha in (0.9, 1.0, 1.1):
            other = PathCurve(
                c=fit.fitted.c * c,
                alpha=fit.fitted.alpha * alpha,
                times=fit.fitted.times,
                distance=[],
                unchanged=[],
                deviation=math.nan,
            )
            distance, _ = by_brute_force(other, codebook_KD=codebook_KD, sample=sample)
            off = [abs(d - (1 - t)) for t, d in zip(other.times, distance, strict=True)][1:-1]
            assert sum(off) / len(off) > fit.fitted.deviation - 1e-4


def test_a_fit_repeats_and_lengths_of_embeddings_do_not_matter() -> None:
    first, again, longer = (
        fit_path(codebook(scale=scale), sample=sample_codes(torch.ones(K), codes=50, seed=1))
        for scale in (1.0, 1.0, 7.0)
    )
    assert first == again
    assert longer.fitted.c == pytest.approx(first.fitted.c, rel=1e-2)
    assert longer.fitted.alpha == pytest.approx(first.fitted.alpha, rel=1e-2)


def test_a_sample_follows_the_counts() -> None:
    rare_K = torch.ones(K)
    rare_K[7], rare_K[100:] = 1000.0, 0.0
    whole = sample_codes(rare_K, codes=K, seed=0)
    assert whole.codes_N.tolist() == list(range(100))
    assert whole.weights_N[7] == pytest.approx(1000 / 1099)
    some = sample_codes(rare_K, codes=50, seed=0)
    assert some.codes_N.max() < 100
    assert some.weights_N.sum() == pytest.approx(1.0)
    # Of 50 equal steps over the sum, 45 or 46 fall on the frequent code.
    assert dict(zip(some.codes_N.tolist(), some.weights_N.tolist(), strict=True))[
        7
    ] == pytest.approx(1000 / 1099, abs=1 / 50)
    alike = sample_codes(torch.ones(K), codes=100, seed=0)
    assert len(alike.codes_N) == 100
    assert alike.codes_N.tolist() != sample_codes(torch.ones(K), codes=100, seed=1).codes_N.tolist()


def test_a_codebook_without_distances_is_refused() -> None:
    with pytest.raises(DataError, match="16 codes do not differ in direction"):
        fit_path(torch.ones(16, 4) * torch.arange(1, 17)[:, None], sample=everything(16))
