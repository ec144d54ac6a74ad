"""A document is a list of parts in reading order; every reader makes one, every writer takes one.

Readers of data make ``Text`` and ``Image`` only. ``Special`` (an assistant's turn, a chain of
thought) comes from templates and from generated ids, and ``Broken`` only from ids: whatever does
not parse as an image keeps its ids and a reason, so that nothing generated vanishes silently.
"""

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from emu35.errors import DataError


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text. Special strings in it are ordinary characters."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """A picture as a grid of codes, [H, W] integers.

    Raises:
        DataError: if the array is not a non-empty grid of integers.
    """

    codes_HW: NDArray[np.integer]

    def __post_init__(self) -> None:
        check_grid(self.codes_HW)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and np.array_equal(self.codes_HW, other.codes_HW)


@dataclass(frozen=True, slots=True)
class Special:
    """One special token that is neither a visual code nor part of an image's layout."""

    token: str


@dataclass(frozen=True, slots=True)
class Broken:
    """Ids that form no image, and why."""

    ids: tuple[int, ...]
    reason: str


Part: TypeAlias = Text | Image | Special | Broken


@dataclass(slots=True)
class Document:
    """Parts in order, with the name of the source and an id that is unique within it."""

    parts: list[Part]
    source: str = field(default="", kw_only=True)
    id: str = field(default="", kw_only=True)

    @property
    def texts(self) -> list[str]:
        """The text of every ``Text`` part."""
        return [part.text for part in self.parts if isinstance(part, Text)]

    @property
    def images(self) -> list[NDArray[np.integer]]:
        """The codes of every ``Image`` part, each [H, W]."""
        return [part.codes_HW for part in self.parts if isinstance(part, Image)]

    @property
    def problems(self) -> list[str]:
        """Why each ``Broken`` part is broken; empty for a sound document."""
        return [part.reason for part in self.parts if isinstance(part, Broken)]


def check_grid(codes_HW: NDArray[np.generic]) -> None:
    """Raise DataError unless ``codes_HW`` is a non-empty [H, W] array of integers."""
    if codes_HW.ndim != 2 or 0 in codes_HW.shape:
        raise DataError(
            f"an image of codes has shape {list(codes_HW.shape)}; it must be [height, width], "
            "at least 1 x 1"
        )
    if not np.issubdtype(codes_HW.dtype, np.integer):
        raise DataError(f"an image's codes have type {codes_HW.dtype}; they must be integers")
