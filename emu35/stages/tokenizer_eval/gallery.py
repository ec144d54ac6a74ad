"""Which pictures come in which batch, cut to squares; damaged ones are named."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from emu35.vision.pictures import Rejects
from emu35.vision.resize import RejectedImage, open_image


class EncodedPicture(Protocol):
    """A picture that can be read; ``name`` is what messages call it."""

    @property
    def name(self) -> str: ...

    def read(self) -> bytes: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """Pictures of one batch, by their numbers: uint8 [B, 3, side, side]. ``enlarged`` of them were
    smaller than that. B may be 0."""

    numbers: list[int]
    levels_B3HW: torch.Tensor
    enlarged: int


def batches(count: int, *, size: int, rank: int, ranks: int) -> list[range]:
    """The numbers of this rank's batches among 0 to ``count`` - 1. Which pictures share a batch
    does not depend on the number of ranks: networks may round otherwise in other company."""
    every = [range(first, min(first + size, count)) for first in range(0, count, size)]
    return every[rank::ranks]


def load(numbers: range, *, files: Sequence[EncodedPicture], side: int, rejects: Rejects) -> Loaded:
    """Those of ``files`` with these ``numbers``; one that cannot be used goes to ``rejects``."""
    kept: list[int] = []
    squares: list[NDArray[np.uint8]] = []
    enlarged = 0
    for number in numbers:
        image = read_picture(files[number], rejects=rejects)
        if image is None:
            continue
        enlarged += min(image.size) < side
        kept.append(number)
        squares.append(centre_square(image, side=side))
    stacked = np.stack(squares) if squares else np.zeros((0, side, side, 3), np.uint8)
    levels_B3HW = torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
    return Loaded(numbers=kept, levels_B3HW=levels_B3HW, enlarged=enlarged)


def read_picture(file: EncodedPicture, *, rejects: Rejects) -> Image.Image | None:
    """``file`` as RGB, None if it cannot be used, and named in ``rejects`` then."""
    try:
        return open_image(file.read())
    except (RejectedImage, OSError) as error:
        rejects.reasons[file.name] = str(error)
        return None


def centre_square(image: Image.Image, *, side: int) -> NDArray[np.uint8]:
    """uint8 [side, side, 3]: the shorter side resized (bicubic) to ``side`` pixels, the middle of
    the longer one."""
    return np.asarray(ImageOps.fit(image, (side, side), method=Image.Resampling.BICUBIC))
