"""Pictures as a few numbers on how rough they are: a feature space without a trained network.

Of every channel and for four scales, the energy of horizontal, vertical and diagonal Haar details;
of what is left, mean and contrast. Blur, ringing and blocks move these numbers at once, but what a
picture shows does not: a Frechet distance between them tells whether reconstructions have the
texture of originals, and is no FID.
"""

import math

import torch

SCALES = 4
CHANNELS = 3
SMALLEST = 2**SCALES
"""Pixels a side that every scale needs."""

DIMENSIONS = CHANNELS * (3 * SCALES + 2)

FLOOR = 1 / 255
"""Added to every energy before its logarithm: below one level nothing is seen."""


def wavelet_features(levels_B3HW: torch.Tensor) -> torch.Tensor:
    """fp64 [B, 42] of uint8 pictures of at least 16 pixels a side: for luminance and two colour
    differences, logarithms of the root mean square of details, fine to coarse, then mean and
    logarithm of the standard deviation of the rest. Odd rows and columns at the end are left out.
    """
    red, green, blue = (levels_B3HW.double() / 255).unbind(1)
    luminance = (red + green + blue) / 3
    rest_BCHW = torch.stack([luminance, red - green, (red + green) / 2 - blue], 1)
    found: list[torch.Tensor] = []
    for _ in range(SCALES):
        height, width = rest_BCHW.shape[2] // 2 * 2, rest_BCHW.shape[3] // 2 * 2
        a, b = rest_BCHW[:, :, 0:height:2, 0:width:2], rest_BCHW[:, :, 0:height:2, 1:width:2]
        c, d = rest_BCHW[:, :, 1:height:2, 0:width:2], rest_BCHW[:, :, 1:height:2, 1:width:2]
        for detail in (a - b + c - d, a + b - c - d, a - b - c + d):
            found.append(_log(detail.square().mean((2, 3)).sqrt() / 4))
        rest_BCHW = (a + b + c + d) / 4
    found += [rest_BCHW.mean((2, 3)), _log(rest_BCHW.std((2, 3), correction=0))]
    return torch.cat(found, 1)


def _log(energy_BC: torch.Tensor) -> torch.Tensor:
    return torch.log(energy_BC + FLOOR) / math.log(2)
