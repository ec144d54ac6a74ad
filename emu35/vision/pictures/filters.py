"""Which pictures are used: filters on scores, and who was left out by which."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emu35.config.images import SIZE_SCORERS, MissingScore, PictureFilterConfig, ScorerConfig
from emu35.errors import DataError
from emu35.vision.pictures.files import PictureFiles, Rejects

KEPT, BROKEN = -1, -2
"""Verdicts; 0 and above is the filter that left a picture out."""


class Filters:
    """The filters of a run, told apart by what they cost: ``cheap`` ones need no pixels."""

    def __init__(
        self, filters: Sequence[PictureFilterConfig], *, scorers: Mapping[str, ScorerConfig]
    ) -> None:
        self.all = list(filters)
        self._scorers = scorers
        self.cheap = [n for n, bounds in enumerate(filters) if not self._is_dear(bounds)]
        self.dear = [n for n, bounds in enumerate(filters) if self._is_dear(bounds)]

    @property
    def need_sizes(self) -> bool:
        """Whether any filter asks for a size."""
        return any(bounds.scorer in SIZE_SCORERS for bounds in self.all)

    @property
    def fields(self) -> list[str]:
        """The fields of the metadata that they ask for."""
        fields = [self.field(bounds.scorer) for bounds in self.all]
        return list(dict.fromkeys(field for field in fields if field is not None))

    @property
    def computed(self) -> list[str]:
        """Names of the scorers that look at pixels."""
        return list(dict.fromkeys(self.all[number].scorer for number in self.dear))

    def field(self, scorer: str) -> str | None:
        """The field of the metadata where its score may be."""
        return self._scorers[scorer].field if scorer in self._scorers else None

    def failing(self, number: int, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which of ``scores`` filter ``number`` leaves out; NaN is a missing score."""
        bounds = self.all[number]
        low = -math.inf if bounds.min is None else bounds.min
        high = math.inf if bounds.max is None else bounds.max
        inside = (scores >= low) & (scores <= high)
        return ~(inside | np.isnan(scores) if bounds.missing is MissingScore.keep else inside)

    def words(self, number: int) -> str:
        """``sharpness_proxy (min 50)``."""
        bounds = self.all[number]
        given = [("min", bounds.min), ("max", bounds.max)]
        limits = ", ".join(f"{name} {value:g}" for name, value in given if value is not None)
        return f"{bounds.scorer} ({limits})"

    def reason(self, number: int, score: float, *, damage: str | None = None) -> str:
        """Why a picture of that score is left out; ``damage`` is what is wrong with its metadata,
        if anything is."""
        bounds = self.all[number]
        if math.isnan(score):
            field = self.field(bounds.scorer)
            lacks = damage or f"its metadata have no number {field!r}"
            return f"{bounds.scorer}: no score" + (f", {lacks}" if field else "")
        if bounds.min is not None and score < bounds.min:
            return f"{bounds.scorer}={score:.6g} is below {bounds.min:g}"
        return f"{bounds.scorer}={score:.6g} is above {bounds.max:g}"

    def _is_dear(self, bounds: PictureFilterConfig) -> bool:
        if bounds.scorer in SIZE_SCORERS:
            return False
        scorer = self._scorers.get(bounds.scorer)
        return scorer is None or scorer.kind != "metadata"


def size_score(
    name: str, *, width: NDArray[np.float64], height: NDArray[np.float64]
) -> NDArray[np.float64]:
    """One of :data:`~emu35.config.images.SIZE_SCORERS`, [N], of pictures of those sizes."""
    if name == "width":
        return width
    if name == "height":
        return height
    if name == "min_side":
        return np.minimum(width, height)
    if name == "pixels":
        return width * height
    assert name == "aspect"
    return np.maximum(width, height) / np.minimum(width, height)


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A picture that a filter left out, and why."""

    picture: str
    reason: str

    def row(self) -> bytes:
        """A JSON line."""
        # ASCII: a file name may hold bytes that are no UTF-8, and characters that end a line.
        line = json.dumps({"picture": self.picture, "reason": self.reason})
        return line.encode("ascii") + b"\n"


@dataclass(kw_only=True, slots=True)
class Selection:
    """What became of every picture of a listing.

    Attributes:
        verdict_N: KEPT, BROKEN, or the filter that left it out.
        score_N: the score that decided.
        sizes_N2: (width, height), 0 where unknown; None if nobody asked.
        broken: index -> reason.
        damaged: index -> what is wrong with the metadata, of all whose metadata cannot be read.
        seen: for each filter the scores it was shown, fp32.
    """

    files: PictureFiles
    filters: Filters
    verdict_N: NDArray[np.int16]
    score_N: NDArray[np.float64]
    sizes_N2: NDArray[np.int64] | None
    broken: dict[int, str]
    damaged: dict[int, str]
    seen: list[list[NDArray[np.float32]]]

    @property
    def kept(self) -> NDArray[np.int64]:
        """Indices of the pictures that are used, ascending."""
        return np.flatnonzero(self.verdict_N == KEPT)

    def left_out(self) -> Iterator[LeftOut]:
        """Those that a filter left out, in the order of the listing."""
        for index in np.flatnonzero(self.verdict_N >= 0).tolist():
            reason = self.filters.reason(
                int(self.verdict_N[index]),
                float(self.score_N[index]),
                damage=self.damaged.get(index),
            )
            yield LeftOut(picture=self.files[index].name, reason=reason)

    def reject_broken(self, rejects: Rejects) -> None:
        """Name the broken ones among ``rejects``, and metadata that cannot be read, as something
        of their own: the picture may be used all the same."""
        for index, reason in self.broken.items():
            rejects.reasons[self.files[index].name] = reason
        for index, reason in self.damaged.items():
            used = "; the picture is used" if self.verdict_N[index] == KEPT else ""
            rejects.reasons[f"metadata of {self.files[index].name}"] = reason + used

    def summary(self) -> str:
        """How many are used, and how many each filter left out of those it was shown."""
        lines = [f"{len(self.kept)} of {len(self.files)} pictures are used"]
        if self.broken:
            lines.append(f"{len(self.broken)} broken")
        if self.damaged:
            lines.append(f"{len(self.damaged)} with metadata that cannot be read")
        for number in range(len(self.filters.all)):
            count = int((self.verdict_N == number).sum())
            lines.append(
                f"{count} left out by {self.filters.words(number)}, {self._spread(number)}"
            )
        return "; ".join(lines)

    def check(self, *, min_kept: float) -> None:
        """
        Raises:
            DataError: no picture is left, or fewer than the share ``min_kept``.
        """
        kept, count = len(self.kept), len(self.files)
        if kept and kept >= min_kept * count:
            return
        first = next(iter(self.broken.items()), None)
        broken = f" (the first broken: {self.files[first[0]].name}: {first[1]})" if first else ""
        raise DataError(
            f"{self.summary()}{broken}; at least the share data.min_kept={min_kept:g} must be "
            "left, and one: loosen data.filters, or correct data.paths"
        )

    def _spread(self, number: int) -> str:
        seen = np.concatenate([np.zeros(0, np.float32), *self.seen[number]])
        scores = seen[~np.isnan(seen)]
        if not len(scores):
            return "which saw no score"
        low, middle, high = np.percentile(scores, [5, 50, 95])
        return f"which saw {middle:.4g} in the median, {low:.4g} to {high:.4g} in 90%"


def refuse_missing(
    found: Selection, number: int, *, scores: NDArray[np.float64], indices: NDArray[np.int64]
) -> None:
    """``scores`` are those of ``indices`` in the listing.

    Raises:
        DataError: a score is missing and the filter says to refuse.
    """
    bounds = found.filters.all[number]
    missing = np.flatnonzero(np.isnan(scores))
    if bounds.missing is MissingScore.refuse and len(missing):
        index = int(indices[missing[0]])
        why = found.filters.reason(number, math.nan, damage=found.damaged.get(index))
        raise DataError(
            f"{found.files[index].name}: {why}, and data.filters[{number}].missing=refuse; add the "
            "score, or use missing=drop or keep"
        )
