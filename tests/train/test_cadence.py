"""When a validation set has its turn follows from the step alone."""

import pytest

from emu35.config import PretrainConfig
from emu35.config.data import Modality
from emu35.train.held_out import HeldOut
from emu35.train.objective import counted_labels, weights_by_modality


def turns(every: int, *, steps: int, validate_every: int) -> list[int]:
    """The steps of a run after which a set is evaluated."""
    stage = PretrainConfig(steps=steps, validate_every=validate_every)
    held_out = HeldOut(
        documents=[],  # type: ignore[arg-type]
        token_weights=weights_by_modality(counted_labels(Modality.all)),
        every=every,
    )
    due = range(validate_every, steps + 1, validate_every) if validate_every else []
    return [s for s in sorted({*due, steps}) if held_out.has_turn(s, stage=stage)]


@pytest.mark.parametrize(
    ("every", "steps", "validate_every", "expected"),
    [
        (1, 50, 10, [10, 20, 30, 40, 50]),
        (2, 50, 10, [10, 30, 50]),
        (3, 50, 10, [10, 40, 50]),
        (3, 45, 10, [10, 40, 45]),
        (9, 50, 10, [10, 50]),
        (4, 50, 0, [50]),
    ],
)
def test_the_first_then_every_kth_and_the_last(
    every: int, steps: int, validate_every: int, expected: list[int]
) -> None:
    assert turns(every, steps=steps, validate_every=validate_every) == expected
