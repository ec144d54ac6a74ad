"""Classical statistics in the place of learnt judgements of quality, looks and watermarks.

They are proxies. Noise is sharp, confetti is colourful, and a page of a book looks like a watermark
to whatever counts strokes: look at what a bound leaves out (``filtered.jsonl``) before it is used
on data that nobody has seen. All depend on the size at which a picture is scored, which is the
training resolution.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from emu35.vision.pictures.scorers import Picture

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""

CELL = 16
"""Side of the cells in which strokes are looked for, in pixels."""

STROKE_CONTRAST = 24.0
STROKE_BIMODALITY = 0.8
STROKE_CROSSINGS = 1.5
"""What makes a cell look written on: the standard deviation of its brightness (half the distance of
ink and ground), the share of its variance that two levels explain (0.64 for normal, 0.75 for
uniform values, 1 for ink on ground), and how often a row crosses from one to the other on average
(an edge crosses once)."""

_VERSION = 1
"""Changes when a formula does, so that scores kept from before are not used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proxy:
    """A statistic as a :class:`~emu35.vision.pictures.scorers.PictureScorer`."""

    name: str
    side: int
    measure: Callable[[Picture], float]

    @property
    def identity(self) -> str:
        return f"{self.name} {_VERSION} at {self.side} px"

    def score(self, pictures: Sequence[Picture]) -> NDArray[np.float64]:
        return np.array([self.measure(picture) for picture in pictures], dtype=np.float64)


def sharpness(picture: Picture) -> float:
    """Variance of the Laplacian of brightness in 0..255 (Pech-Pacheco et al., "Diatom autofocusing
    in brightfield microscopy", 2000). Higher is sharper: below about 50 most pictures look blurred
    at 256 px."""
    light_HW = _brightness(picture)
    if min(light_HW.shape) < 3:
        return 0.0
    sides_HW = light_HW[:-2, 1:-1] + light_HW[2:, 1:-1] + light_HW[1:-1, :-2] + light_HW[1:-1, 2:]
    return float((sides_HW - 4 * light_HW[1:-1, 1:-1]).var())


def contrast(picture: Picture) -> float:
    """Standard deviation of brightness, 0 (one level) to 127.5 (black and white)."""
    return float(_brightness(picture).std())


def colourfulness(picture: Picture) -> float:
    """Hasler and Suesstrunk's measure ("Measuring colourfulness in natural images", 2003): 0 for
    greys, 15 slightly, 45 quite, 109 extremely colourful."""
    red, green, blue = (picture[:, :, channel].astype(np.float64) for channel in range(3))
    first, second = red - green, (red + green) / 2 - blue
    spread = np.hypot(first.std(), second.std())
    shift = np.hypot(first.mean(), second.mean())
    return float(spread + 0.3 * shift)


def overlay(picture: Picture) -> float:
    """Share of the picture that looks written on, 0 to 1, higher for watermarks and captions:
    cells of CELL pixels that hold two levels of brightness in many strokes."""
    light_HW = _brightness(picture)
    rows, columns = light_HW.shape[0] // CELL, light_HW.shape[1] // CELL
    if not rows or not columns:
        return 0.0
    cells_RCHW = (
        light_HW[: rows * CELL, : columns * CELL]
        .reshape(rows, CELL, columns, CELL)
        .transpose(0, 2, 1, 3)
    )
    # The middle of the range parts ink from ground, however little ink there is.
    low_RC, high_RC = cells_RCHW.min(axis=(2, 3)), cells_RCHW.max(axis=(2, 3))
    ink_RCHW = cells_RCHW > ((low_RC + high_RC) / 2)[:, :, None, None]
    share_RC = ink_RCHW.mean(axis=(2, 3))
    both_RC = np.maximum(share_RC * (1 - share_RC), 1e-12)
    mean_RC = cells_RCHW.mean(axis=(2, 3))
    ink_mean_RC = (cells_RCHW * ink_RCHW).mean(axis=(2, 3))
    between_RC = (ink_mean_RC - share_RC * mean_RC) ** 2 / both_RC
    variance_RC = cells_RCHW.var(axis=(2, 3))
    crossings_RC = (ink_RCHW[..., 1:] != ink_RCHW[..., :-1]).sum(axis=3).mean(axis=2)
    written_RC = (
        (variance_RC >= STROKE_CONTRAST**2)
        & (between_RC >= STROKE_BIMODALITY * variance_RC)
        & (crossings_RC >= STROKE_CROSSINGS)
    )
    return float(written_RC.mean())


_MEASURES: Mapping[str, Callable[[Picture], float]] = MappingProxyType(
    {
        "sharpness_proxy": sharpness,
        "contrast_proxy": contrast,
        "colourfulness_proxy": colourfulness,
        "overlay_proxy": overlay,
    }
)


def make_proxy(name: str, *, side: int) -> Proxy:
    """The proxy ``name`` (of :data:`emu35.config.images.PROXY_SCORERS`), for pictures whose shorter
    side is ``side`` pixels."""
    return Proxy(name=name, side=side, measure=_MEASURES[name])


def _brightness(picture: Picture) -> NDArray[np.float64]:
    """fp64 [H, W] in 0..255."""
    return picture.astype(np.float64) @ np.array(LUMA)
