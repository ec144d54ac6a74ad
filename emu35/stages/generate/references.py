"""Reference images: files to codes, each read once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from emu35.errors import ConfigError, DataError
from emu35.stages.generate.files import png_of
from emu35.stages.generate.options import Wish
from emu35.tokens.template import TASKS, Task
from emu35.vision.codec import ImageCodec
from emu35.vision.resize import RejectedImage, open_image, smart_resize, to_pixels


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reference:
    """A reference image as the model sees it: codes [H, W], and the PNG of what they are of."""

    codes_HW: NDArray[np.integer]
    png: bytes


class References:
    """Reference images by path, resized to ``area`` pixels (None: what the task takes), for a model
    of ``positions`` positions. Without a ``codec`` there are none.

    Raises:
        ConfigError: an area that is less than a code, or more than the positions hold.
    """

    def __init__(self, *, codec: ImageCodec | None, area: int | None, positions: int) -> None:
        if codec is not None and area is not None:
            _check_area(area, factor=codec.factor, positions=positions)
        self._codec = codec
        self._area = area
        self._found: dict[tuple[Path, int], Reference] = {}

    def require_codec(self, what: str) -> ImageCodec:
        """The image tokenizer, without which there is no ``what``.

        Raises:
            DataError: there is none.
        """
        if self._codec is None:
            raise DataError(
                f"{what} needs an image tokenizer, and the model names none; start again with "
                "--vision FOLDER (config.yaml and model.ckpt)"
            )
        return self._codec

    def read(self, wishes: Sequence[Wish]) -> None:
        """Read the references of ``wishes``, so that none of them fails later.

        Raises:
            DataError: naming every file that cannot be used, and the first wish it belongs to.
        """
        problems: dict[Path, str] = {}
        for wish in wishes:
            for path in wish.images:
                if path in problems:
                    continue
                try:
                    self.open(path, task=wish.task)
                except DataError as error:
                    problems[path] = f"{wish.where}: {error}" if len(wishes) > 1 else str(error)
        if problems:
            raise DataError("\n".join(problems.values()))

    def of(self, wish: Wish) -> list[Reference]:
        """Those of one wish, in order."""
        return [self.open(path, task=wish.task) for path in wish.images]

    def open(self, path: Path, *, task: Task) -> Reference:
        """One reference for ``task``.

        Raises:
            DataError: naming the file and what is wrong with it.
        """
        codec = self.require_codec(f"image {path}")
        key = (path, self._area or TASKS[task].image_area)
        if key not in self._found:
            with _naming(path):
                pixels_3HW = to_pixels(open_image(path), area=key[1], factor=codec.factor)
            codes_1HW = codec.encode(torch.from_numpy(pixels_3HW)[None])
            self._found[key] = Reference(
                codes_HW=codes_1HW[0].cpu().numpy(), png=png_of(pixels_3HW)
            )
        return self._found[key]

    def shape(self, path: Path, *, task: Task) -> tuple[int, int]:
        """Rows and columns of the codes that :meth:`open` would make, without making them.

        Raises:
            DataError: naming the file and what is wrong with it.
        """
        factor = self.require_codec(f"image {path}").factor
        area = self._area or TASKS[task].image_area
        with _naming(path):
            width, height = open_image(path).size
            width, height = smart_resize(width=width, height=height, area=area, factor=factor)
        return height // factor, width // factor


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which reference was refused."""
    try:
        yield
    except RejectedImage as error:
        raise DataError(f"reference image {path}: {error}") from error


def _check_area(area: int, *, factor: int, positions: int) -> None:
    smallest, largest = factor**2, positions * factor**2
    if not smallest <= area <= largest:
        raise ConfigError(
            f"image_area={area} must lie in {smallest}..{largest} pixels: a code is {factor} x "
            f"{factor} of them, and the model has {positions:,} positions for codes; set "
            "--image-area accordingly, or leave it to the task"
        )
