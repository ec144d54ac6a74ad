"""When a run ends by itself, and that a resumed one decides alike."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu35.config.grpo import EvaluationConfig
from emu35.errors import CheckpointError
from emu35.stages.grpo.stopping import EarlyStop


def _ended_at(values: list[float], *, patience: int, min_gain: float = 0.0) -> int | None:
    """The step whose validation ends the run, one validation a step."""
    stop = EarlyStop(EvaluationConfig(patience=patience, min_gain=min_gain), sets=["scenes"])
    for step, value in enumerate(values, start=1):
        stop.observe(step, {"scenes/reward": value})
        if stop.finished:
            return step
    return None


@pytest.mark.parametrize(
    ("values", "patience", "min_gain", "end"),
    [
        ([4, 5, 6, 7], 1, 0.0, None),
        ([4, 5, 5, 5], 2, 0.0, 4),  # equal is no gain
        ([4, 5, 4, 6, 4, 4], 2, 0.0, 6),  # a gain begins the wait again
        ([4, 4.1, 4.2, 4.3], 3, 0.25, None),  # small gains add up against the best that counted
        ([4, 4.1, 4.2], 2, 0.5, 3),
        ([4, 3, 2, 1], 0, 0.0, None),  # no patience asked for: never
        ([4, math.nan, math.nan, 5, 5], 1, 0.0, 5),  # what was not measured is no evidence
    ],
)
def test_when_it_ends(values: list[float], patience: int, min_gain: float, end: int | None) -> None:
    assert _ended_at(values, patience=patience, min_gain=min_gain) == end


def test_what_is_watched() -> None:
    metrics = {"a/reward": 4.0, "b/reward": 8.0, "a/ocr": 1.0, "a/entropy": 100.0}
    for watch, best in ((None, 6.0), ("b", 8.0), ("a/ocr", 1.0)):
        stop = EarlyStop(EvaluationConfig(patience=1, watch=watch), sets=["a", "b"])
        stop.observe(1, metrics)
        stop.observe(2, metrics)
        assert stop.state_dict()["best"] == best
        assert stop.finished
        assert f"{best:g} at step 1" in stop.finished


def test_a_set_without_its_turn_is_not_averaged_over() -> None:
    """The mean over another choice of sets is another quantity, here a lower one."""
    stop = EarlyStop(EvaluationConfig(patience=1), sets=["easy", "hard"])
    stop.observe(1, {"easy/reward": 9.0, "hard/reward": 3.0})
    stop.observe(2, {"hard/reward": 4.0})
    assert stop.finished is None
    assert stop.state_dict()["step"] == 1


@given(
    st.lists(st.floats(min_value=1, max_value=10), min_size=1, max_size=12),
    st.integers(min_value=0, max_value=12),
)
def test_a_resumed_run_ends_where_the_whole_one_does(values: list[float], cut: int) -> None:
    config = EvaluationConfig(patience=2)

    def observed(stop: EarlyStop, steps: range) -> EarlyStop:
        for step in steps:
            stop.observe(step, {"s/reward": values[step - 1]})
        return stop

    cut = min(cut, len(values))
    whole = observed(EarlyStop(config, sets=["s"]), range(1, len(values) + 1))
    first = observed(EarlyStop(config, sets=["s"]), range(1, cut + 1))
    resumed = EarlyStop(config, sets=["s"])
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    # The validation of the last step before the stop comes again.
    observed(resumed, range(max(1, cut), len(values) + 1))
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.finished == whole.finished


def test_another_watch_is_refused() -> None:
    saved = EarlyStop(EvaluationConfig(patience=1, watch="a"), sets=["a", "b"]).state_dict()
    other = EarlyStop(EvaluationConfig(patience=1, watch="b"), sets=["a", "b"])
    with pytest.raises(CheckpointError, match=r"watched a/reward.*watch b/reward"):
        other.load_state_dict(saved)
