"""``aesthetics``: pixel statistics in the place of taste."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from emu35.config.reward_local import AestheticsRewardConfig
from emu35.rewards.sample import Cost, Picture, Range, Record, Sample, Score, Unscored

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""

SHARP = 0.02
"""Mean absolute Laplacian of brightness in [0, 1] at which sharpness is one half."""

CONTRASTY = 0.25
"""Standard deviation of brightness that is full contrast."""

COLOURFUL = 109.0
"""Hasler and Suesstrunk's colourfulness of what people call extremely colourful."""


class AestheticsReward:
    """Weighted mean of :func:`sharpness`, :func:`exposure`, :func:`contrast` and
    :func:`colourfulness`, over all pictures of the answer, in [0, 1]. They are proxies: noise is
    sharp and confetti is colourful, so watch them (``held_out``) rather than train on them alone.
    """

    range = Range(low=0.0, high=1.0)
    cost = Cost.cpu

    def __init__(self, config: AestheticsRewardConfig) -> None:
        self._parts = (
            (sharpness, config.sharpness),
            (exposure, config.exposure),
            (contrast, config.contrast),
            (colourfulness, config.colourfulness),
        )

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        return [self._score(sample) for sample in samples]

    def problems(self, record: Record) -> list[str]:
        """None: any picture has pixels."""
        return []

    def _score(self, sample: Sample) -> Score:
        if not sample.pictures:
            return Unscored("the answer has no picture to look at")
        return float(np.mean([self._of(picture) for picture in sample.pictures]))

    def _of(self, picture: Picture) -> float:
        total = sum(weight for _, weight in self._parts)
        return sum(weight * part(picture) for part, weight in self._parts) / total


def sharpness(picture: Picture) -> float:
    """Mean absolute Laplacian of brightness, saturating: x / (x + SHARP), in [0, 1)."""
    light_HW = _brightness(picture)
    if min(light_HW.shape) < 3:
        return 0.0
    inner_HW = light_HW[1:-1, 1:-1]
    sides_HW = light_HW[:-2, 1:-1] + light_HW[2:, 1:-1] + light_HW[1:-1, :-2] + light_HW[1:-1, 2:]
    edges = float(np.abs(4 * inner_HW - sides_HW).mean())
    return edges / (edges + SHARP)


def exposure(picture: Picture) -> float:
    """1 where brightness is one half on average and nothing is clipped to black or white; 0 for a
    picture that is all black or all white."""
    light_HW = _brightness(picture)
    clipped = float(((light_HW <= 1 / 255) | (light_HW >= 254 / 255)).mean())
    return (1 - abs(2 * float(light_HW.mean()) - 1)) * (1 - clipped)


def contrast(picture: Picture) -> float:
    """Standard deviation of brightness as a share of CONTRASTY, at most 1."""
    return min(1.0, float(_brightness(picture).std()) / CONTRASTY)


def colourfulness(picture: Picture) -> float:
    """Hasler and Suesstrunk's measure ("Measuring colourfulness in natural images", 2003) as a
    share of COLOURFUL, at most 1; 0 for greys."""
    red, green, blue = (picture[:, :, channel].astype(np.float64) for channel in range(3))
    first, second = red - green, (red + green) / 2 - blue
    spread = np.hypot(first.std(), second.std())
    shift = np.hypot(first.mean(), second.mean())
    return min(1.0, float(spread + 0.3 * shift) / COLOURFUL)


def _brightness(picture: Picture) -> NDArray[np.float64]:
    """fp64 [H, W] in [0, 1]."""
    return picture @ np.array(LUMA) / 255
