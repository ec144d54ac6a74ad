"""How far pictures are from their originals, pixel by pixel and window by window.

Both measures work on 8-bit pictures, which is what a reconstruction is once it is kept or shown:
:func:`to_levels` rounds to the nearest of the 256 levels.
"""

import math

import torch
from torch.nn.functional import conv2d

PSNR_CAP = 100.0
"""Decibels that a picture without any error counts as. A single level that is off in one channel of
one pixel of 1024 x 1024 is 113 dB, so an error that is seen is far below."""

LEVELS = 255.0
WINDOW, SIGMA = 11, 1.5
"""Pixels a side and standard deviation of SSIM's window."""

C1, C2 = (0.01 * LEVELS) ** 2, (0.03 * LEVELS) ** 2


def to_levels(pixels_B3HW: torch.Tensor) -> torch.Tensor:
    """uint8 of pixels in [-1, 1]: clamped, and rounded to the nearest level."""
    return ((pixels_B3HW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_levels(levels_B3HW: torch.Tensor) -> torch.Tensor:
    """fp32 in [-1, 1] of uint8, x / 127.5 - 1."""
    return levels_B3HW.float() / 127.5 - 1


def psnr(levels_B3HW: torch.Tensor, *, target_B3HW: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, fp64 [B], of uint8 pictures: 10 log10(255^2 / mean squared
    error over all pixels and channels), :data:`PSNR_CAP` at the most."""
    error_BE = (levels_B3HW.double() - target_B3HW.double()).flatten(1)
    least = LEVELS**2 / 10 ** (PSNR_CAP / 10)
    return 10 * torch.log10(LEVELS**2 / error_BE.square().mean(1).clamp_min(least))


def ssim(levels_B3HW: torch.Tensor, *, target_B3HW: torch.Tensor) -> torch.Tensor:
    """Structural similarity, fp64 [B], of uint8 pictures of at least 11 pixels a side.

    As published (Wang et al. 2004, doi 10.1109/TIP.2003.819861): Gaussian windows of 11 x 11 with
    standard deviation 1.5, population variances, K1 = 0.01 and K2 = 0.03, only windows that lie
    within the picture; the mean over them and over red, green and blue.
    """
    height, width = levels_B3HW.shape[2:]
    if min(height, width) < WINDOW:
        raise ValueError(f"a picture of {height} x {width} pixels; SSIM needs {WINDOW} a side")
    x, y = (each.double().flatten(0, 1)[:, None] for each in (levels_B3HW, target_B3HW))
    mean_x, mean_y = _blurred(x), _blurred(y)
    # Rounding may leave the variance of a flat window a little below 0.
    variance_x = (_blurred(x * x) - mean_x**2).clamp_min(0)
    variance_y = (_blurred(y * y) - mean_y**2).clamp_min(0)
    covariance = _blurred(x * y) - mean_x * mean_y
    alike = ((2 * mean_x * mean_y + C1) * (2 * covariance + C2)) / (
        (mean_x**2 + mean_y**2 + C1) * (variance_x + variance_y + C2)
    )
    return alike.view(len(levels_B3HW), -1).mean(1)


def _blurred(x_N1HW: torch.Tensor) -> torch.Tensor:
    """Weighted means of every whole window, along rows and then along columns."""
    places = torch.arange(WINDOW, dtype=x_N1HW.dtype, device=x_N1HW.device) - WINDOW // 2
    weights = torch.exp(-(places**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    across = conv2d(x_N1HW, weights.view(1, 1, 1, -1))
    return conv2d(across, weights.view(1, 1, -1, 1))


def is_capped(decibels: float) -> bool:
    """Whether a PSNR is that of a picture with no error, or with next to none."""
    return math.isclose(decibels, PSNR_CAP)
