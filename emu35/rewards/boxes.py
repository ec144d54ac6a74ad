"""Boxes as prompts give them: x0, y0, x1, y1 as shares of width and height, from the upper left
corner."""

import math
from collections.abc import Iterable
from typing import Any, TypeAlias

Box: TypeAlias = tuple[float, float, float, float]


def box_problem(value: Any) -> str | None:
    """Why ``value``, as JSON has it, is no box; None where it is one."""
    if not isinstance(value, list) or len(value) != 4:
        return "must be four numbers: x0, y0, x1, y1"
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int | float) or not math.isfinite(item):
            return f"has {item!r}, which is no number"
    x0, y0, x1, y1 = value
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        return "must lie in [0, 1] with x0 < x1 and y0 < y1 (shares of width and height)"
    return None


def area(box: Box) -> float:
    x0, y0, x1, y1 = box
    return max(0.0, x1 - x0) * max(0.0, y1 - y0)


def shared(a: Box, b: Box) -> float:
    """Area of what both cover."""
    return area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


def overlap(a: Box, b: Box) -> float:
    """Intersection over union, in [0, 1]; 0 for boxes without area."""
    both = shared(a, b)
    return both / (area(a) + area(b) - both) if both > 0 else 0.0


def around(boxes: Iterable[Box]) -> Box:
    """The smallest box around one or more."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)
