"""From a picture of any size to the pixels that training sees.

What is drawn for a sample (place, corner, mirroring) is a pure function of seed and sample number.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu35.vision.resize import smart_resize

LONGEST = 2
"""Longest side kept, in multiples of what is needed; the rest is cut off evenly before resizing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """The chances of samples: each question has a stream of its own, so that one that is no longer
    asked changes no other."""

    seed: int

    def position(self, sample: int) -> float:
        """In [0, 1): where along the longer side a picture is cut."""
        return float(np.random.default_rng([self.seed, 1, sample]).random())

    def corner(self, sample: int, *, rows: int, columns: int) -> tuple[int, int]:
        """(top, left) of a crop, below ``rows`` and ``columns``."""
        rng = np.random.default_rng([self.seed, 2, sample])
        top, left = rng.integers((rows, columns)).tolist()
        return top, left

    def mirrored(self, sample: int, *, share: float) -> bool:
        """Whether a sample is flipped from left to right, in ``share`` of all cases."""
        return share > 0 and np.random.default_rng([self.seed, 3, sample]).random() < share


def shorter_side(image: Image.Image, *, side: int, factor: int) -> NDArray[np.uint8]:
    """uint8 [3, H, W] whose shorter side is ``side``, the longer at most LONGEST times that."""
    image = _middle(image, widest=LONGEST, tallest=LONGEST)
    longer, shorter = max(image.size), min(image.size)
    new_width, new_height = smart_resize(
        width=image.width,
        height=image.height,
        area=round(side**2 * longer / shorter),
        factor=factor,
    )
    # Rounding to the factor may move the shorter side by one notch; the crop needs it exact.
    return _resized(image, width=max(new_width, side), height=max(new_height, side))


def covering(image: Image.Image, *, width: int, height: int) -> NDArray[np.uint8]:
    """uint8 [3, H, W] of the picture's own aspect that just covers ``width`` times ``height``, at
    most LONGEST times as long as needed."""
    aspect = width / height
    image = _middle(image, widest=LONGEST * aspect, tallest=LONGEST / aspect)
    scale = max(width / image.width, height / image.height)
    return _resized(
        image,
        width=max(width, round(scale * image.width)),
        height=max(height, round(scale * image.height)),
    )


def window(
    picture_3HW: NDArray[np.uint8], *, width: int, height: int, position: float
) -> NDArray[np.uint8]:
    """What ``width`` times ``height`` pixels show, cut at ``position`` (0: left and top end, 1: the
    other) along what is left over."""
    _, rows, columns = picture_3HW.shape
    top, left = round(position * (rows - height)), round(position * (columns - width))
    return picture_3HW[:, top : top + height, left : left + width]


def square(picture_3HW: NDArray[np.uint8], *, position: float) -> NDArray[np.uint8]:
    """The largest square at ``position`` along the longer side."""
    side = min(picture_3HW.shape[1:])
    return window(picture_3HW, width=side, height=side, position=position)


def crop(
    picture_3HW: NDArray[np.uint8], *, width: int, height: int, draw: Draw, sample: int
) -> NDArray[np.uint8]:
    """The piece of ``width`` times ``height`` pixels that sample ``sample`` is."""
    _, rows, columns = picture_3HW.shape
    top, left = draw.corner(sample, rows=rows - height + 1, columns=columns - width + 1)
    return picture_3HW[:, top : top + height, left : left + width]


def _middle(image: Image.Image, *, widest: float, tallest: float) -> Image.Image:
    """The middle of a picture that is more than ``widest`` times as wide as high, or ``tallest``
    times as high as wide."""
    kept_width = max(1, min(image.width, round(widest * image.height)))
    kept_height = max(1, min(image.height, round(tallest * image.width)))
    left, top = (image.width - kept_width) // 2, (image.height - kept_height) // 2
    return image.crop((left, top, left + kept_width, top + kept_height))


def _resized(image: Image.Image, *, width: int, height: int) -> NDArray[np.uint8]:
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
