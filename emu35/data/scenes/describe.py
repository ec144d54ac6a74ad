"""What a scene is: objects with shape, colour, size and place on a plain background.

All geometry is in fractions of the picture's side, so a scene has no resolution of its own.
"""

import hashlib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Shape(StrEnum):
    """Outlines that stay distinct at a few dozen pixels."""

    circle = "circle"
    square = "square"
    triangle = "triangle"
    star = "star"


class Colour(StrEnum):
    """Saturated colours, at least 30 degrees of hue apart (see :data:`RGB`)."""

    red = "red"
    orange = "orange"
    yellow = "yellow"
    green = "green"
    cyan = "cyan"
    blue = "blue"
    purple = "purple"
    pink = "pink"


class Size(StrEnum):
    """Names for :data:`DIAMETERS`."""

    small = "small"
    medium = "medium"
    large = "large"


class Place(StrEnum):
    """Cells of a 3 x 3 grid, row by row."""

    top_left = "top_left"
    top = "top"
    top_right = "top_right"
    left = "left"
    centre = "centre"
    right = "right"
    bottom_left = "bottom_left"
    bottom = "bottom"
    bottom_right = "bottom_right"


class Background(StrEnum):
    """Neutral, so that any saturated pixel belongs to an object."""

    white = "white"
    black = "black"


class Split(StrEnum):
    """Side of the train / held-out divide."""

    train = "train"
    val = "val"


RGB: Mapping[Colour, tuple[int, int, int]] = {
    Colour.red: (225, 20, 20),
    Colour.orange: (250, 130, 0),
    Colour.yellow: (250, 230, 0),
    Colour.green: (20, 170, 40),
    Colour.cyan: (0, 210, 220),
    Colour.blue: (25, 65, 230),
    Colour.purple: (130, 30, 200),
    Colour.pink: (255, 60, 170),
}
BACKGROUND_RGB: Mapping[Background, tuple[int, int, int]] = {
    Background.white: (255, 255, 255),
    Background.black: (0, 0, 0),
}
DIAMETERS: Mapping[Size, float] = {Size.small: 0.27, Size.medium: 0.34, Size.large: 0.42}
"""Side of a square, diameter of a circle and so on, as a fraction of the picture's side."""

GRID = (0.25, 0.5, 0.75)
"""Where the centres of the grid's columns and rows lie."""

GAP = 0.04
"""Least distance between the bounding boxes of two objects."""

VAL_SHARE = 10
"""One scene in this many is held out."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class SceneObject:
    """One shape somewhere in the picture."""

    shape: Shape
    colour: Colour
    size: Size
    place: Place

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y), from the top left."""
        row, column = divmod(list(Place).index(self.place), 3)
        return GRID[column], GRID[row]

    @property
    def diameter(self) -> float:
        return DIAMETERS[self.size]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One to three objects, in reading order of their places."""

    objects: tuple[SceneObject, ...]
    background: Background = Background.white

    def to_json(self) -> dict[str, Any]:
        """Plain values, the form kept beside each picture."""
        return {
            "background": str(self.background),
            "objects": [
                {
                    "shape": str(item.shape),
                    "colour": str(item.colour),
                    "size": str(item.size),
                    "place": str(item.place),
                }
                for item in self.objects
            ],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Scene":
        """The inverse of :meth:`to_json`.

        Raises:
            KeyError, ValueError: ``value`` lacks a field or names an unknown attribute.
        """
        return Scene(
            objects=tuple(
                SceneObject(
                    shape=Shape(item["shape"]),
                    colour=Colour(item["colour"]),
                    size=Size(item["size"]),
                    place=Place(item["place"]),
                )
                for item in value["objects"]
            ),
            background=Background(value["background"]),
        )


def hashed_share(text: str) -> float:
    """A number in [0, 1) that ``text`` always has: what lies below a share belongs to it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def split_of(scene: Scene) -> Split:
    """The side ``scene`` is on: a hash of its objects.

    The background is left out on purpose. Captions need not name it, so two scenes that differ in
    nothing else share their captions and must share their side.
    """
    description = json.dumps(sorted(scene.to_json()["objects"], key=str), sort_keys=True)
    digest = hashlib.sha256(description.encode()).digest()
    return Split.val if digest[0] * 256 + digest[1] < 65536 // VAL_SHARE else Split.train


def sample_scene(
    rng: random.Random, *, split: Split, count_weights: tuple[float, ...] = (0.6, 0.25, 0.15)
) -> Scene:
    """A random scene of ``split``; ``count_weights`` are the shares of 1, 2, 3 objects."""
    while True:
        count = rng.choices(range(1, len(count_weights) + 1), weights=count_weights)[0]
        while True:
            objects = _sample_objects(rng, count=count)
            scene = Scene(objects=objects, background=rng.choice(list(Background)))
            if split_of(scene) is split:
                return scene


def _sample_objects(rng: random.Random, *, count: int) -> tuple[SceneObject, ...]:
    """``count`` objects that do not touch, in reading order."""
    while True:
        places = sorted(rng.sample(list(Place), count), key=list(Place).index)
        objects = tuple(
            SceneObject(
                shape=rng.choice(list(Shape)),
                colour=rng.choice(list(Colour)),
                size=rng.choice(list(Size)),
                place=place,
            )
            for place in places
        )
        if _apart(objects):
            return objects


def _apart(objects: tuple[SceneObject, ...]) -> bool:
    for index, first in enumerate(objects):
        for second in objects[index + 1 :]:
            (x1, y1), (x2, y2) = first.centre, second.centre
            reach = (first.diameter + second.diameter) / 2 + GAP
            if max(abs(x1 - x2), abs(y1 - y2)) < reach - 1e-9:
                return False
    return True


def outline(
    shape: Shape, *, centre: tuple[float, float], diameter: float
) -> list[tuple[float, float]]:
    """Corner points of ``shape`` in the units of ``centre`` and ``diameter``.

    Renderer and verifier share these points, so a template is exactly what was drawn. The
    triangle's bounding box, not its centroid, sits on ``centre``, like the star's.
    """
    x, y = centre
    r = diameter / 2
    match shape:
        case Shape.circle:
            angles = [2 * math.pi * k / 64 for k in range(64)]
            return [(x + r * math.cos(a), y + r * math.sin(a)) for a in angles]
        case Shape.square:
            # A little smaller than the circle's box, so that areas are closer together.
            h = 0.9 * r
            return [(x - h, y - h), (x + h, y - h), (x + h, y + h), (x - h, y + h)]
        case Shape.triangle:
            return [(x, y - r), (x + 1.1 * r, y + 0.9 * r), (x - 1.1 * r, y + 0.9 * r)]
        case Shape.star:
            outer, inner = 1.15 * r, 0.48 * r
            points: list[tuple[float, float]] = []
            for k in range(10):
                radius = outer if k % 2 == 0 else inner
                angle = math.pi * k / 5 - math.pi / 2
                points.append(
                    (x + radius * math.cos(angle), y + 0.05 * r + radius * math.sin(angle))
                )
            return points
