"""The Frechet distance against closed forms and against another way to compute it."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from emu35.errors import DataError
from emu35.vision.frechet import Gaussian, Moments, fit_gaussian, frechet_distance


def features(*, seed: int, count: int = 60, dimensions: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dimensions, dimensions))
    return rng.normal(size=(count, dimensions)) @ mixing + rng.normal(size=dimensions)


def test_a_set_is_at_no_distance_from_itself() -> None:
    fit = fit_gaussian(features(seed=0))
    assert frechet_distance(fit, fit) == pytest.approx(0, abs=1e-9)


def test_known_gaussians_have_their_closed_form() -> None:
    deviations = np.array([[1.0, 2.0, 0.5], [3.0, 0.0, 0.25]])
    means = np.array([[0.0, 1.0, 2.0], [0.5, 1.0, -2.0]])
    a, b = (
        Gaussian(mean_D=mean, covariance_DD=np.diag(deviation**2), count=100)
        for mean, deviation in zip(means, deviations, strict=True)
    )
    wanted = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(wanted)
    assert frechet_distance(b, a) == pytest.approx(wanted)


def test_it_is_what_the_root_of_the_product_gives() -> None:
    a_ND, b_ND = features(seed=1), features(seed=2, count=40)
    root = np.real(sqrtm(np.cov(a_ND.T) @ np.cov(b_ND.T)))
    wanted = ((a_ND.mean(0) - b_ND.mean(0)) ** 2).sum() + np.trace(
        np.cov(a_ND.T) + np.cov(b_ND.T) - 2 * root
    )
    found = frechet_distance(fit_gaussian(a_ND), fit_gaussian(b_ND))
    assert found == pytest.approx(wanted, rel=1e-8)


def test_directions_without_spread_are_no_trouble() -> None:
    flat = features(seed=3)
    flat[:, 2] = 7.0
    moved = flat.copy()
    moved[:, 2] += 1
    distance = frechet_distance(fit_gaussian(flat), fit_gaussian(moved))
    assert distance == pytest.approx(1.0, abs=1e-6)


def test_too_few_pictures_are_refused() -> None:
    few, enough = fit_gaussian(features(seed=4, count=5)), fit_gaussian(features(seed=4, count=6))
    assert (few.enough, enough.enough) == (False, True)
    with pytest.raises(DataError, match="5 pictures are too few for a Frechet distance in 5 dim"):
        frechet_distance(few, enough)
    with pytest.raises(DataError, match="at least two"):
        fit_gaussian(features(seed=4, count=1))
    with pytest.raises(DataError, match="not finite"):
        fit_gaussian(np.array([[0.0], [np.nan]]))
    with pytest.raises(DataError, match="one feature space"):
        frechet_distance(enough, fit_gaussian(features(seed=4, dimensions=4)))


def test_sums_that_come_in_parts_make_the_same_gaussian() -> None:
    rows = features(seed=3, count=40)
    moments = Moments(rows.shape[1])
    assert moments.gaussian() is None
    for part in (rows[:1], rows[1:25], rows[25:]):
        moments.add(part)
    found, wanted = moments.gaussian(), fit_gaussian(rows)
    assert found is not None
    assert found.count == wanted.count
    np.testing.assert_allclose(found.mean_D, wanted.mean_D, rtol=1e-12)
    np.testing.assert_allclose(found.covariance_DD, wanted.covariance_DD, rtol=1e-9, atol=1e-12)


def test_sums_of_no_finite_numbers_are_refused() -> None:
    moments = Moments(2)
    moments.add(np.array([[1.0, 2.0], [np.nan, 0.0]]))
    with pytest.raises(DataError, match="not finite"):
        moments.gaussian()
