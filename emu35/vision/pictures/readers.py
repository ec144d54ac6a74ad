"""Where numbers about pictures come from: headers, metadata, pixels.

A reader fills one or several columns from one visit to a picture. What it costs differs by orders
of magnitude, so the survey asks the cheap ones first.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from emu35.vision.pictures import cut
from emu35.vision.pictures.columns import Column
from emu35.vision.pictures.files import PictureFile
from emu35.vision.pictures.scorers import Picture, PictureScorer
from emu35.vision.resize import RejectedImage, header_size, open_image

HEADER_BYTES = 1 << 16
"""Read first for the size; a header that is longer (profiles, thumbnails) costs a second look."""


@dataclass(kw_only=True, slots=True)
class Readings:
    """Of N pictures: column name -> [N], NaN where there is no number; place -> what could not be
    read, which is the picture for sizes and pixels, and its metadata for numbers in these."""

    values: dict[str, NDArray[np.float64]]
    reasons: dict[int, str] = field(default_factory=dict[int, str])


class Reader(Protocol):
    """Fills columns."""

    @property
    def columns(self) -> Sequence[Column]:
        """Those it can fill."""
        ...

    @property
    def batch(self) -> int:
        """Pictures to be read at a time, which bounds the memory it takes."""
        ...

    def read(
        self, files: Sequence[PictureFile], *, wanted: Sequence[str], pool: Executor
    ) -> Readings:
        """The columns named ``wanted`` of ``files``; ``pool`` shares the work out to threads."""
        ...


class SizeReader:
    """``width`` and ``height`` in pixels, upright, from the fields of the metadata that are named
    (if they are there) or the header. ``metadata`` is the
    :attr:`~emu35.vision.pictures.files.PictureFiles.metadata_digest` of the listing."""

    batch = 256

    def __init__(self, *, metadata: str, fields: tuple[str, str] | None = None) -> None:
        self._fields = fields
        source = "sizes, header"
        if fields:
            source = f"sizes, {fields[0]} x {fields[1]} of {metadata} or header"
        self.columns = [Column(name=name, identity=source) for name in ("width", "height")]

    def read(
        self, files: Sequence[PictureFile], *, wanted: Sequence[str], pool: Executor
    ) -> Readings:
        del wanted
        sizes_N2 = np.full((len(files), 2), np.nan)
        reasons = dict[int, str]()
        for place, found in enumerate(pool.map(self._size, files)):
            if isinstance(found, str):
                reasons[place] = found
            else:
                sizes_N2[place] = found
        values = {"width": sizes_N2[:, 0], "height": sizes_N2[:, 1]}
        return Readings(values=values, reasons=reasons)

    def _size(self, file: PictureFile) -> tuple[int, int] | str:
        try:
            if self._fields is not None:
                width, height = (_number(file, field) for field in self._fields)
                if min(width, height) >= 1:  # not where one is NaN
                    return int(width), int(height)
            try:
                return header_size(file.read(HEADER_BYTES))
            except RejectedImage:
                if file.size <= HEADER_BYTES:
                    raise
                return header_size(file.read())
        except (RejectedImage, OSError) as error:
            return str(error)


class MetadataReader:
    """Numbers in the JSON beside pictures, columns called as their fields are; ``metadata`` as
    above."""

    batch = 256

    def __init__(self, fields: Sequence[str], *, metadata: str) -> None:
        self.columns = [
            Column(name=field, identity=f"metadata {field} of {metadata}") for field in fields
        ]

    def read(
        self, files: Sequence[PictureFile], *, wanted: Sequence[str], pool: Executor
    ) -> Readings:
        found_NF = np.full((len(files), len(wanted)), np.nan)
        reasons = dict[int, str]()

        def numbers(file: PictureFile) -> list[float] | str:
            try:
                metadata = file.read_metadata()
            except (OSError, ValueError) as error:
                return f"its metadata cannot be read ({error})"
            return [number_in(metadata, field) for field in wanted]

        for place, found in enumerate(pool.map(numbers, files)):
            if isinstance(found, str):
                reasons[place] = found
            else:
                found_NF[place] = found
        values = {name: found_NF[:, index] for index, name in enumerate(wanted)}
        return Readings(values=values, reasons=reasons)


class PixelReader:
    """What scorers make of pictures; each is decoded once for all of them."""

    batch = 32

    def __init__(self, scorers: Sequence[PictureScorer]) -> None:
        self._scorers = {scorer.name: scorer for scorer in scorers}

    @property
    def columns(self) -> Sequence[Column]:
        # Identities read whole model files, which only the rank that keeps the columns needs.
        return [
            Column(name=name, identity=scorer.identity) for name, scorer in self._scorers.items()
        ]

    def read(
        self, files: Sequence[PictureFile], *, wanted: Sequence[str], pool: Executor
    ) -> Readings:
        scorers = [self._scorers[name] for name in wanted]
        sides = sorted({scorer.side for scorer in scorers})
        seen = list[dict[int, Picture]]()
        places, reasons = list[int](), dict[int, str]()

        def look(file: PictureFile) -> dict[int, Picture] | str:
            try:
                image = open_image(file.read())
                # Scores must not depend on the tokenizer's factor, hence 1.
                return {
                    side: np.ascontiguousarray(
                        cut.shorter_side(image, side=side, factor=1).transpose(1, 2, 0)
                    )
                    for side in sides
                }
            except (RejectedImage, OSError) as error:
                return str(error)

        for place, found in enumerate(pool.map(look, files)):
            if isinstance(found, str):
                reasons[place] = found
            else:
                places.append(place)
                seen.append(found)
        values = {scorer.name: np.full(len(files), np.nan) for scorer in scorers}
        for scorer in scorers:
            values[scorer.name][places] = scorer.score([found[scorer.side] for found in seen])
        return Readings(values=values, reasons=reasons)


def number_in(metadata: object, field: str) -> float:
    """The number at ``field``, dots reaching into sections; NaN where there is none. Numbers that
    are written as words count, as spreadsheets leave them."""
    for name in field.split("."):
        if not isinstance(metadata, dict) or name not in metadata:
            return math.nan
        metadata = metadata[name]
    if isinstance(metadata, bool | int | float | str):
        try:
            number = float(metadata)
        except (ValueError, OverflowError):
            return math.nan
        return number if math.isfinite(number) else math.nan
    return math.nan


def _number(file: PictureFile, field: str) -> float:
    try:
        return number_in(file.read_metadata(), field)
    except (OSError, ValueError):
        return math.nan  # the header tells the same
