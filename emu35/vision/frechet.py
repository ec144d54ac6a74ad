"""The Frechet distance between two sets of pictures, each taken for a Gaussian in a feature space.

    d^2 = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

(arXiv 1706.08500, equation 6). The numbers of two feature spaces do not compare: only those in the
space of Inception-v3 are what papers call FID.

A covariance of N pictures in D dimensions has rank N - 1 at most. With N <= D the distance still
has a value, but one that says more about N than about the pictures, and shrinking the covariance
would only trade that for the choice of a target. So :func:`frechet_distance` refuses, and whoever
reports says that there were too few. With N above D the distance of two sets of one distribution
is above 0 by about D / N in units of the variance: it wants to be read beside that of two sets
which differ in their seeds alone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emu35.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Gaussian:
    """Mean fp64 [D] and unbiased covariance fp64 [D, D] of ``count`` feature vectors."""

    mean_D: NDArray[np.float64]
    covariance_DD: NDArray[np.float64]
    count: int

    @property
    def dimensions(self) -> int:
        return len(self.mean_D)

    @property
    def enough(self) -> bool:
        """Whether there are more vectors than dimensions."""
        return self.count > self.dimensions


def fit_gaussian(features_ND: NDArray[np.floating]) -> Gaussian:
    """The Gaussian of the rows of ``features_ND``.

    Raises:
        DataError: there are fewer than two, or they are not finite.
    """
    features_ND = np.asarray(features_ND, dtype=np.float64)
    if features_ND.ndim != 2 or len(features_ND) < 2:
        raise DataError(
            f"features of shape {features_ND.shape}: a covariance needs at least two pictures"
        )
    if not np.isfinite(features_ND).all():
        raise DataError(
            "features of pictures are not finite; is the network that makes them sound?"
        )
    return Gaussian(
        mean_D=features_ND.mean(0),
        covariance_DD=np.atleast_2d(np.cov(features_ND, rowvar=False)),
        count=len(features_ND),
    )


class Moments:
    """Sums over feature vectors that come a few at a time, or on several ranks: what
    :func:`fit_gaussian` makes of all of them, up to rounding in fp64."""

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.sum_D: NDArray[np.float64] = np.zeros(dimensions)
        self.products_DD: NDArray[np.float64] = np.zeros((dimensions, dimensions))

    def add(self, features_ND: NDArray[np.floating]) -> None:
        """Count the rows of ``features_ND``."""
        features_ND = np.asarray(features_ND, dtype=np.float64)
        self.count += len(features_ND)
        self.sum_D += features_ND.sum(0)
        self.products_DD += features_ND.T @ features_ND

    def gaussian(self) -> Gaussian | None:
        """The Gaussian of all vectors, None if there are fewer than two.

        Raises:
            DataError: they are not finite.
        """
        if self.count < 2:
            return None
        if not np.isfinite(self.products_DD).all():
            raise DataError(
                "features of pictures are not finite; is the network that makes them sound?"
            )
        mean_D = self.sum_D / self.count
        spread_DD = self.products_DD - self.count * np.outer(mean_D, mean_D)
        return Gaussian(mean_D=mean_D, covariance_DD=spread_DD / (self.count - 1), count=self.count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared distance, as papers report it.

    The trace of (C_a C_b)^(1/2) is the sum of the square roots of the eigenvalues of
    C_a^(1/2) C_b C_a^(1/2), which is symmetric: no root of a general matrix is taken, and nothing
    complex comes of a covariance that is nearly singular.

    Raises:
        DataError: the dimensions differ, or a set is not larger than its dimensions.
    """
    if a.dimensions != b.dimensions:
        raise DataError(
            f"features of {a.dimensions} and of {b.dimensions} numbers: a distance needs both in "
            "one feature space"
        )
    if not (a.enough and b.enough):
        raise DataError(
            f"{min(a.count, b.count)} pictures are too few for a Frechet distance in "
            f"{a.dimensions} dimensions; use at least {a.dimensions + 1}"
        )
    root_DD = _square_root(a.covariance_DD)
    eigenvalues_D = np.linalg.eigvalsh(root_DD @ b.covariance_DD @ root_DD)
    overlap = np.sqrt(np.clip(eigenvalues_D, 0, None)).sum()
    spread = np.trace(a.covariance_DD) + np.trace(b.covariance_DD) - 2 * overlap
    # Rounding may leave the distance of equal sets a little below 0.
    return max(0.0, float(((a.mean_D - b.mean_D) ** 2).sum() + spread))


def _square_root(matrix_DD: NDArray[np.float64]) -> NDArray[np.float64]:
    """That of a symmetric matrix without negative eigenvalues, but for rounding."""
    values_D, vectors_DD = np.linalg.eigh(matrix_DD)
    return (vectors_DD * np.sqrt(np.clip(values_D, 0, None))) @ vectors_DD.T
