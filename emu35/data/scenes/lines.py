"""Pictures of lines of text at several heights, to see which of them survive.

Unlike the words of :mod:`emu35.data.scenes.words`, which a small model is to learn to draw, these
are to be read back after something was done to the picture: English words in the font that comes
with Pillow, in colours that contrast, each line at a height that is told as a share of the
picture's. What a picture holds depends on its seed and number alone, so that it can be drawn at any
resolution.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WORDS = (
    *("sun", "map", "tea", "ink", "fox", "oak", "jar", "sky", "bell", "fern", "lamp", "milk"),
    *("door", "rope", "salt", "wind", "bread", "chair", "cloud", "frost", "grape", "horse"),
    *("knife", "lemon", "piano", "river", "stone", "tiger", "wheat", "zebra", "bridge", "candle"),
    *("forest", "garden", "hammer", "island", "jacket", "kitchen", "lantern", "machine"),
    *("orchard", "picture", "quarter", "sailing", "thunder", "village", "weather", "compass"),
)

COLOURS = (
    ((20, 20, 20), (250, 250, 250)),
    ((250, 250, 250), (25, 25, 30)),
    ((20, 40, 120), (250, 240, 190)),
    ((255, 255, 240), (20, 90, 60)),
    ((140, 20, 30), (235, 235, 235)),
)
"""Of letters and behind them."""

WIDEST = 0.92
"""Of the picture's width that a line may take."""

LEAST, MOST = 0.01, 0.8
"""Heights of lines, whatever is asked for."""

GAP = 0.5
"""Between lines, in heights of the upper one."""

TRIES = 40
_PROBE = 200.0
"""Points at which a text is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenLine:
    """What stands where: the upright box around the letters, x0, y0, x1, y1 as shares of width and
    height."""

    text: str
    box: tuple[float, float, float, float]


def line_heights(bounds: Sequence[float]) -> list[float]:
    """A height within each of the ranges that the rising ``bounds`` divide, the smallest first."""
    if not bounds:
        return [0.1]
    between = [(low * high) ** 0.5 for low, high in pairwise(bounds)]
    return [max(LEAST, 0.7 * bounds[0]), *between, min(MOST, 1.25 * bounds[-1])]


def render_lines(
    number: int, *, side: int, heights: Sequence[float], seed: int
) -> tuple[Image.Image, list[WrittenLine]]:
    """Picture ``number``, square with ``side`` pixels, and what stands in it from top to bottom: a
    line of every one of ``heights`` as far as there is room, beginning with another one each time.
    """
    rng = random.Random(f"{seed} {number}")
    ink, ground = COLOURS[rng.randrange(len(COLOURS))]
    image = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(image)
    first = number % len(heights)
    lines: list[WrittenLine] = []
    top = 0.04
    for height in [*heights[first:], *heights[:first]]:
        if top + height > 0.98:
            continue
        text, points = _fitting(rng, height=height)
        font = ImageFont.load_default(points * side)
        box = font.getbbox(text)
        wide, high = (box[2] - box[0]) / side, (box[3] - box[1]) / side
        left = rng.uniform(0.02, max(0.02, 0.98 - wide))
        draw.text((left * side - box[0], top * side - box[1]), text, font=font, fill=ink)
        lines.append(WrittenLine(text=text, box=(left, top, left + wide, top + high)))
        top += max(high, height) * (1 + GAP)
    return image, lines


def _fitting(rng: random.Random, *, height: float) -> tuple[str, float]:
    """A text that is no wider than :data:`WIDEST` at ``height``, and its size in points for a
    picture of one pixel; small lines have two words."""
    narrow: tuple[float, str, float] | None = None
    for _ in range(TRIES):
        words = rng.sample(WORDS, 2 if height < 0.08 else 1)
        text = rng.choice((str.lower, str.upper, str.title))(" ".join(words))
        box = _probed(text)
        points = height * _PROBE / (box[3] - box[1])
        width = points / _PROBE * (box[2] - box[0])
        if width <= WIDEST:
            return text, points
        if narrow is None or width < narrow[0]:
            narrow = (width, text, points)
    assert narrow is not None
    width, text, points = narrow
    return text, points * WIDEST / width


def _probed(text: str) -> Any:
    return ImageFont.load_default(_PROBE).getbbox(text)
