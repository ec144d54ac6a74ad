"""From a place in training back to the documents: which ones a row of a step was made of.

The stream of rows is a function of the configuration, the data and the cursor alone, so it is
planned again rather than kept: from a state that a checkpoint holds, or from the beginning.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emu35.data.batch import SourceItems
from emu35.data.opening import OpenPlan
from emu35.data.plan import Sample

Watch = Callable[[int], None]
"""Hears how many steps were planned again so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """The planner's ``state`` after step ``step``; None before the first."""

    step: int = 0
    state: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Columns [left, right) of a row: tokens [start, start + right - left) of document ``document``
    of a source."""

    left: int
    right: int
    entry: SourceItems
    document: int
    start: int

    @property
    def end(self) -> int:
        return self.start + self.right - self.left

    @property
    def whole(self) -> bool:
        """Whether the row holds all of the document."""
        return self.right - self.left == int(self.entry.source.length[self.document])


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sample of a step: ``number`` in the stream, and its documents from left to right."""

    number: int
    pieces: list[Piece]

    @property
    def tokens(self) -> int:
        return self.pieces[-1].right

    def piece_at(self, column: int) -> Piece | None:
        """The document of a column; None where there is padding."""
        return next((p for p in self.pieces if p.left <= column < p.right), None)


def check_position(plan: OpenPlan, *, position: Position) -> None:
    """Whether a state fits the data as they are now; the planner stays where it is.

    Raises:
        DataError: naming what changed.
    """
    if position.state is not None:
        here = plan.planner.state_dict()
        plan.planner.load_state_dict(position.state)
        plan.planner.load_state_dict(here)


def rows_of_step(
    plan: OpenPlan, *, step: int, global_batch_size: int, start: Position, watch: Watch
) -> list[Row]:
    """The rows of ``step``, counted from 1, in the order of the global batch.

    ``start`` is a position before it, from which the steps between are planned again.

    Raises:
        DataError: if the data changed since ``start`` was saved, naming what.
    """
    assert start.step < step
    if start.state is not None:
        plan.planner.load_state_dict(start.state)
    for done in range(step - start.step - 1):
        plan.planner.take(global_batch_size)
        watch(done + 1)
    samples = plan.planner.take(global_batch_size)
    return [_row(sample, sources=plan.sources) for sample in samples]


def _row(sample: Sample, *, sources: Sequence[SourceItems]) -> Row:
    pieces: list[Piece] = []
    left = 0
    for number, item in sample.items:
        entry = sources[number]
        right = left + int(entry.items.length[item])
        pieces.append(
            Piece(
                left=left,
                right=right,
                entry=entry,
                document=int(entry.items.document[item]),
                start=int(entry.items.start[item]),
            )
        )
        left = right
    return Row(number=sample.number, pieces=pieces)
