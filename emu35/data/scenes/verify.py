"""Reading a scene back from pixels, by plain image processing.

The pictures to be read come from a small image tokenizer's decoder, so they are blurred, slightly
off in colour and speckled. Four steps cope with that: saturated pixels are taken as foreground and
given the palette colour nearest in hue; each colour's connected regions are found and specks
dropped; a region that clings to a much larger one is an artefact of its edge; and a region's
outline is the shape whose ideal mask, of equal area on the same centroid, overlaps it most.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from emu35.data.scenes.describe import (
    DIAMETERS,
    GRID,
    RGB,
    Colour,
    Place,
    Scene,
    Shape,
    Size,
    outline,
)

Mask = NDArray[np.bool_]

SATURATED = 80
"""Least spread between a foreground pixel's largest and smallest channel, of 255. About half of
the palest palette colour's, so that the border of a blurred object is cut at its half height."""

LEAST_AREA = 0.006
"""Smallest region taken for an object, as a share of the picture; the smallest star has 0.014."""

ARTEFACT_SHARE = 0.3
"""A region touching another is part of it when it is smaller than this share of it."""

SPECK = 4
"""Regions of fewer pixels are noise and not looked at."""

MOST_PAIRED = 12
"""Only this many of the largest regions are candidates for pairing: it bounds the search."""

BLURS = (0.0, 0.012, 0.024)
"""Radii of Gaussian blur that a region may have gone through, as fractions of the side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundObject:
    """A region that reads as an object. ``centre`` (x, y) and ``area`` are fractions of the
    picture's side and surface; ``overlap`` is the intersection over union with the best shape."""

    colour: Colour
    shape: Shape
    size: Size
    place: Place
    centre: tuple[float, float]
    area: float
    overlap: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneScore:
    """How many of a scene's ``objects`` were found with the right attribute."""

    objects: int
    found: int
    colour_correct: int
    shape_correct: int
    size_correct: int
    place_correct: int

    @property
    def count_correct(self) -> bool:
        return self.found == self.objects


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Shares in [0, 1] over all objects (``count``: over all scenes)."""

    colour: float
    shape: float
    size: float
    place: float
    count: float


# ---------------------------------------------------------------------- reading


def read_scene(image_HW3: NDArray[np.uint8]) -> list[FoundObject]:
    """The objects in a square RGB picture, in reading order of their grid cells."""
    height, width = image_HW3.shape[:2]
    labels_HW = _colour_labels(image_HW3)
    regions = [
        (colour, mask)
        for index, colour in enumerate(Colour)
        for mask in _regions(labels_HW == index)
        if mask.sum() >= SPECK
    ]
    regions = _without_artefacts(regions)
    found = [
        _read_region(colour, mask)
        for colour, mask in regions
        if mask.sum() >= LEAST_AREA * height * width
    ]
    return sorted(found, key=lambda item: list(Place).index(item.place))


def _hues(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hue in degrees over the last axis (0 where there is none)."""
    largest, smallest = rgb.max(-1), rgb.min(-1)
    spread = np.maximum(largest - smallest, 1e-9)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sector = 4 + (red - green) / spread
    sector[largest == green] = (2 + (blue - red) / spread)[largest == green]
    sector[largest == red] = ((green - blue) / spread)[largest == red]
    return (60 * sector) % 360


def _colour_labels(image_HW3: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Index into :class:`Colour` where saturated, -1 elsewhere."""
    pixels_HW3 = image_HW3.astype(np.float64)
    palette_C3 = np.array([RGB[colour] for colour in Colour], dtype=np.float64)
    distance_HWC = np.abs(_hues(pixels_HW3)[..., None] - _hues(palette_C3))
    distance_HWC = np.minimum(distance_HWC, 360 - distance_HWC)
    saturated_HW = pixels_HW3.max(-1) - pixels_HW3.min(-1) >= SATURATED
    return np.where(saturated_HW, distance_HWC.argmin(-1), -1)


def _regions(mask_HW: Mask) -> list[Mask]:
    """The 4-connected regions of ``mask_HW``, each as a mask of the whole picture."""
    height, width = mask_HW.shape
    left = {int(index) for index in np.flatnonzero(mask_HW)}
    regions: list[Mask] = []
    while left:
        frontier = [left.pop()]
        members: list[int] = []
        while frontier:
            index = frontier.pop()
            members.append(index)
            column = index % width
            for near, inside in (
                (index - width, True),
                (index + width, True),
                (index - 1, column > 0),
                (index + 1, column < width - 1),
            ):
                if inside and near in left:
                    left.remove(near)
                    frontier.append(near)
        region = np.zeros(height * width, dtype=bool)
        region[members] = True
        regions.append(region.reshape(height, width))
    return regions


def _without_artefacts(regions: list[tuple[Colour, Mask]]) -> list[tuple[Colour, Mask]]:
    """Join every region to the much larger one it touches, if any: its colour was an edge's."""
    regions = sorted(regions, key=lambda pair: -int(pair[1].sum()))
    kept: list[tuple[Colour, Mask]] = []
    for colour, mask in regions:
        around = _grown(mask)
        for index, (host_colour, host) in enumerate(kept):
            if mask.sum() < ARTEFACT_SHARE * host.sum() and bool((around & host).any()):
                kept[index] = (host_colour, host | mask)
                break
        else:
            kept.append((colour, mask))
    return kept


def _grown(mask_HW: Mask) -> Mask:
    """``mask_HW`` and its 4-neighbours."""
    padded = np.pad(mask_HW, 1)
    middle = slice(1, -1)
    return (
        mask_HW
        | padded[:-2, middle]
        | padded[2:, middle]
        | padded[middle, :-2]
        | padded[middle, 2:]
    )


def _read_region(colour: Colour, mask_HW: Mask) -> FoundObject:
    height, width = mask_HW.shape
    shape, overlap, (x, y), diameter = _best_shape(mask_HW)
    # From here on fractions of the side; the centre is the shape's own, not the centroid.
    centre = (x / width, y / height)
    row, column = (
        min(range(3), key=lambda index: abs(GRID[index] - value))
        for value in (centre[1], centre[0])
    )
    return FoundObject(
        colour=colour,
        shape=shape,
        size=min(Size, key=lambda size: abs(DIAMETERS[size] - diameter / width)),
        place=list(Place)[3 * row + column],
        centre=centre,
        area=float(mask_HW.sum()) / (height * width),
        overlap=overlap,
    )


def _best_shape(mask_HW: Mask) -> tuple[Shape, float, tuple[float, float], float]:
    """(shape, overlap, centre and diameter in pixels) of the ideal outline that fits best.

    Every shape is tried sharp and at the blurs of :data:`BLURS`: a blurred star has rounded
    points, and against sharp ideals alone it would pass for a circle.
    """
    area = int(mask_HW.sum())
    ys, xs = np.nonzero(mask_HW)
    centroid = (float(xs.mean()) + 0.5, float(ys.mean()) + 0.5)
    fits: list[tuple[float, Shape, tuple[float, float], float]] = []
    for shape in Shape:
        unit_area, (shift_x, shift_y) = _moments(shape)
        diameter = (area / unit_area) ** 0.5
        centre = (centroid[0] - shift_x * diameter, centroid[1] - shift_y * diameter)
        for blur in BLURS:
            ideal_HW = _drawn(shape, centre=centre, diameter=diameter, blur=blur, like=mask_HW)
            overlap = float((ideal_HW & mask_HW).sum() / (ideal_HW | mask_HW).sum())
            fits.append((overlap, shape, centre, diameter))
    overlap, shape, centre, diameter = max(fits, key=lambda fit: fit[0])
    return shape, overlap, centre, diameter


@lru_cache
def _moments(shape: Shape) -> tuple[float, tuple[float, float]]:
    """Area, and centroid relative to the centre, of ``shape`` at diameter 1."""
    points = outline(shape, centre=(0.0, 0.0), diameter=1.0)
    area = x = y = 0.0
    for (x1, y1), (x2, y2) in itertools.pairwise([*points, points[0]]):
        cross = x1 * y2 - x2 * y1
        area += cross / 2
        x += (x1 + x2) * cross / 6
        y += (y1 + y2) * cross / 6
    return abs(area), (x / area, y / area)


def _drawn(
    shape: Shape,
    *,
    centre: tuple[float, float],
    diameter: float,
    blur: float,
    like: Mask,
) -> Mask:
    """``shape`` as a mask with exactly as many pixels as ``like``: those it covers most."""
    height, width = like.shape
    finer = 4
    canvas = Image.new("L", (width * finer, height * finer), 0)
    points = outline(
        shape, centre=(centre[0] * finer, centre[1] * finer), diameter=diameter * finer
    )
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    cover_HW = np.asarray(canvas.reduce(finer).filter(ImageFilter.GaussianBlur(blur * width)))
    drawn = np.zeros(height * width, dtype=bool)
    drawn[np.argsort(-cover_HW.ravel().astype(np.int64), kind="stable")[: int(like.sum())]] = True
    return drawn.reshape(height, width)


# ---------------------------------------------------------------------- scoring


def score(found: Sequence[FoundObject], *, scene: Scene) -> SceneScore:
    """Compare what was found with what was asked for.

    Objects are paired by least total distance alone, never by attribute: the pairing cannot
    favour a right answer. An object without a partner counts as wrong in everything.
    """
    expected = scene.objects
    best: tuple[float, list[tuple[int, int]]] = (float("inf"), [])
    candidates = sorted(range(len(found)), key=lambda j: -found[j].area)[:MOST_PAIRED]
    fewer = min(len(expected), len(candidates))
    for chosen in itertools.permutations(candidates, fewer):
        for wanted in itertools.combinations(range(len(expected)), fewer):
            pairs = list(zip(wanted, chosen, strict=True))
            distance = sum(
                (expected[i].centre[0] - found[j].centre[0]) ** 2
                + (expected[i].centre[1] - found[j].centre[1]) ** 2
                for i, j in pairs
            )
            if distance < best[0]:
                best = (distance, pairs)
    matched = [(expected[i], found[j]) for i, j in best[1]]
    return SceneScore(
        objects=len(expected),
        found=len(found),
        colour_correct=sum(want.colour is got.colour for want, got in matched),
        shape_correct=sum(want.shape is got.shape for want, got in matched),
        size_correct=sum(want.size is got.size for want, got in matched),
        place_correct=sum(want.place is got.place for want, got in matched),
    )


def accuracy(scores: Iterable[SceneScore]) -> Accuracy:
    """Over at least one scene with at least one object."""
    scores = list(scores)
    objects = sum(item.objects for item in scores)
    return Accuracy(
        colour=sum(item.colour_correct for item in scores) / objects,
        shape=sum(item.shape_correct for item in scores) / objects,
        size=sum(item.size_correct for item in scores) / objects,
        place=sum(item.place_correct for item in scores) / objects,
        count=sum(item.count_correct for item in scores) / len(scores),
    )


def chance(
    founds: Sequence[Sequence[FoundObject]],
    *,
    scenes: Sequence[Scene],
    seed: int = 0,
    rounds: int = 50,
) -> Accuracy:
    """The accuracy of the same pictures against captions that are not theirs.

    A model that draws well but ignores its caption scores this. Uniform guessing would give
    1/8 for colour and 1/4 for shape; a model's habits can lift that, hence the measurement.
    """
    rng = random.Random(seed)
    totals: list[Accuracy] = []
    for _ in range(rounds):
        partner = _exchange(scenes, rng=rng)
        totals.append(
            accuracy(
                score(found, scene=scenes[k]) for found, k in zip(founds, partner, strict=True)
            )
        )

    def mean(name: str) -> float:
        return sum(float(getattr(item, name)) for item in totals) / len(totals)

    fields: dict[str, Any] = {
        name: mean(name) for name in ("colour", "shape", "size", "place", "count")
    }
    return Accuracy(**fields)


def _exchange(scenes: Sequence[Scene], *, rng: random.Random) -> list[int]:
    """For each scene another one with as many objects (itself where it is the only one).

    Exchanging across counts would leave objects unpaired and make chance look lower than it is.
    """
    partner = list(range(len(scenes)))
    for count in {len(scene.objects) for scene in scenes}:
        order = [index for index, scene in enumerate(scenes) if len(scene.objects) == count]
        rng.shuffle(order)
        # A rotation of a random order leaves no picture with its own caption.
        for k, index in enumerate(order):
            partner[index] = order[(k + 1) % len(order)]
    return partner
