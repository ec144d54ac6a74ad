"""``preservation``: what an edit left as it was."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from emu35.config.reward_local import PreservationRewardConfig
from emu35.errors import DataError
from emu35.rewards.boxes import Box, box_problem
from emu35.rewards.optional import optional
from emu35.rewards.sample import Cost, Picture, Range, Record, Sample, Score, Unscored
from emu35.vision.lpips import SMALLEST, Backbone, read_lpips

WINDOW = 7
"""Pixels a side of the windows that SSIM compares."""


class PreservationReward:
    """Likeness of the answer's first picture to the question's outside of what was to change, in
    [0, 1]: SSIM, or the mean of SSIM and 1 - LPIPS where LPIPS has its weights.

    The record says what may change as ``region``, a box or a list of boxes (x0, y0, x1, y1 as
    shares of width and height), or as ``mask``, the path of a picture that is white there; without
    either all is to stay. Of several pictures in the question, ``source`` (from 0) names the one
    that is edited. Within the region the original takes the place of the answer before the two are
    compared, so that windows that reach into it see no change; only places outside count.
    """

    range = Range(low=0.0, high=1.0)
    cost = Cost.cpu

    def __init__(self, config: PreservationRewardConfig) -> None:
        """
        Raises:
            ConfigError: scikit-image is not installed, or LPIPS's weights are not what they should
                be.
        """
        self._ssim: Any = optional("skimage.metrics", reward=config.kind).structural_similarity
        self._masks = Path(config.masks)
        self._lpips = None
        if config.lpips_network is not None and config.lpips_heads is not None:
            self._lpips = read_lpips(
                Backbone.alexnet,
                weights=Path(config.lpips_network),
                heads=Path(config.lpips_heads),
                owner=f"reward kind {config.kind!r}",
            )

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        return [self._score(sample) for sample in samples]

    def problems(self, record: Record) -> list[str]:
        problems: list[str] = []
        images: Any = record.get("images")
        count = len(images) if isinstance(images, list) else int(isinstance(images, str))
        if not count:
            problems.append(
                "reward kind 'preservation' compares with the picture that is edited; add images"
            )
        source: Any = record.get("source", 0)
        if isinstance(source, bool) or not isinstance(source, int) or source < 0:
            problems.append(f"its source={source!r} must be the number of a picture, from 0")
        elif 0 < count <= source:
            problems.append(f"its source={source} is none of its {count} images, counted from 0")
        if record.get("region") is not None and record.get("mask") is not None:
            problems.append("it has a region and a mask; give one of them")
        elif record.get("region") is not None:
            problems += _region_problems(record["region"])
        elif record.get("mask") is not None:
            problems += self._mask_problems(record["mask"])
        return problems

    def _mask_problems(self, mask: Any) -> list[str]:
        if not isinstance(mask, str):
            return ["its mask must be the path of a picture"]
        try:
            free = self._read_mask(mask, size=None)
        except DataError as error:
            return [str(error)]
        return ["its mask is white everywhere; nothing is left to compare"] if free.all() else []

    def _score(self, sample: Sample) -> Score:
        if not sample.pictures:
            return Unscored("the answer has no picture to compare")
        source: int = sample.record.get("source", 0)
        if source >= len(sample.references):
            return Unscored("the question shows no picture to compare with")
        answer = sample.pictures[0]
        height, width = answer.shape[:2]
        before = _resized(sample.references[source], width=width, height=height)
        free_HW = self._free(sample.record, width=width, height=height)
        smallest = WINDOW if self._lpips is None else SMALLEST[Backbone.alexnet]
        if min(height, width) < smallest:
            return Unscored(f"a picture of {height} x {width} pixels is too small to compare")
        if free_HW.all():
            return Unscored("its region covers every pixel; nothing is left to compare")
        after = np.where(free_HW[:, :, None], before, answer)
        _, likeness_HW3 = self._ssim(
            before, after, win_size=WINDOW, channel_axis=2, data_range=255, full=True
        )
        likeness = float(likeness_HW3[~free_HW].mean())
        if self._lpips is None:
            return likeness
        # Its mean runs over all places; those within the region add nothing.
        distance = float(self._lpips.distance(_pixels(before), _pixels(after)))
        return (likeness + 1 - min(1.0, distance / float((~free_HW).mean()))) / 2

    def _free(self, record: Record, *, width: int, height: int) -> NDArray[np.bool_]:
        """bool [H, W]: what may change."""
        if record.get("mask") is not None:
            return self._read_mask(record["mask"], size=(width, height))
        free_HW = np.zeros((height, width), dtype=np.bool_)
        for x0, y0, x1, y1 in _boxes(record.get("region")):
            rows = slice(int(y0 * height), int(np.ceil(y1 * height)))
            free_HW[rows, int(x0 * width) : int(np.ceil(x1 * width))] = True
        return free_HW

    def _read_mask(self, mask: str, *, size: tuple[int, int] | None) -> NDArray[np.bool_]:
        path = self._masks / mask
        try:
            with Image.open(path) as image:
                grey = image.convert("L")
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"its mask {path} cannot be read ({error})") from error
        if size is not None:
            grey = grey.resize(size, Image.Resampling.NEAREST)
        return np.asarray(grey) >= 128


def _boxes(region: Any) -> list[Box]:
    """One box, several, or none, as a list."""
    if not region:
        return []
    return [tuple(box) for box in (region if isinstance(region[0], list) else [region])]


def _region_problems(region: Any) -> list[str]:
    if not isinstance(region, list) or not region:
        return ["its region must be a box [x0, y0, x1, y1], or a list of boxes"]
    boxes: list[Any] = region if isinstance(region[0], list) else [region]
    problems = [f"its region {box!r} {why}" for box in boxes if (why := box_problem(box))]
    if not problems and [0, 0, 1, 1] in boxes:
        problems.append("its region is the whole picture; nothing is left to compare")
    return problems


def _resized(picture: Picture, *, width: int, height: int) -> Picture:
    if picture.shape[:2] == (height, width):
        return picture
    image = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _pixels(picture: Picture) -> torch.Tensor:
    """fp32 [1, 3, H, W] in [-1, 1]."""
    pixels_HW3 = torch.from_numpy(picture.astype(np.float32))
    return (pixels_HW3 / 127.5 - 1).permute(2, 0, 1)[None]
