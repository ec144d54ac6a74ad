"""When: times of training pictures, and the steps of denoising.

Time runs from 0, noise, to 1, the picture. ``sigma`` is what is left of the noise; a shift s bends
it to s sigma / (1 + (s - 1) sigma), which for s > 1 spends more time near the noise, as larger
pictures need, whose codes tell more of each other, and for s < 1 less.
"""

import math

import torch

LEAST_SIGMA = 1e-3
"""Training draws sigma from [1e-3, 1]: at 0 the metric path has no finite slope."""


def shifted(sigma: torch.Tensor, *, shift: torch.Tensor | float) -> torch.Tensor:
    """Times 1 - s sigma / (1 + (s - 1) sigma), of any shape; exactly 0 where sigma is 1."""
    return (1 - sigma) / (1 + (shift - 1) * sigma)


def training_times(uniform_N: torch.Tensor, *, shifts_N: torch.Tensor) -> torch.Tensor:
    """Times fp64 [N] of pictures from uniform noise in (0, 1) and the shift of each."""
    return shifted(1 - (1 - LEAST_SIGMA) * uniform_N, shift=shifts_N)


def picture_shift(codes: int, *, shift: float, reference_codes: int) -> float:
    """The shift of a picture of ``codes`` codes: ``shift`` for one of ``reference_codes``, growing
    with the square root; the same for all where ``reference_codes`` is 0."""
    return shift * math.sqrt(codes / reference_codes) if reference_codes else shift


def schedule(steps: int, *, shift: float) -> torch.Tensor:
    """Times fp64 [steps + 1] at which denoising stands: 0, ..., 1, equally spaced in sigma."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift=shift)
