"""When a run ends by itself, and that a resumed one decides alike."""

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu35.config import GRPOConfig, LMConfig, PromptDataConfig, RunConfig
from emu35.config.grpo import EvaluationConfig
from emu35.config.grpo_rules import grpo_problems
from emu35.config.prompts import PromptTaskConfig
from emu35.config.reward_kinds import REWARD_KINDS
from emu35.errors import CheckpointError
from emu35.stages.grpo.stopping import EarlyStop


def sets(*names: str) -> dict[str, PromptTaskConfig]:
    return {name: PromptTaskConfig(path="", rewards={"light": 1.0}) for name in names}


def _ended_at(values: list[float], *, patience: int, min_gain: float = 0.0) -> int | None:
    """The step whose validation ends the run, one validation a step."""
    stop = EarlyStop(EvaluationConfig(patience=patience, min_gain=min_gain), sets=sets("scenes"))
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
        stop = EarlyStop(EvaluationConfig(patience=1, watch=watch), sets=sets("a", "b"))
        stop.observe(1, metrics)
        stop.observe(2, metrics)
        assert stop.state_dict()["best"] == best
        assert stop.finished
        assert f"{best:g} at step 1" in stop.finished


def test_what_the_run_begins_with_is_the_first_to_beat() -> None:
    stop = EarlyStop(EvaluationConfig(patience=1), sets=sets("a"))
    stop.observe(0, {"a/reward": 5.0})
    assert not stop.finished
    stop.observe(1, {"a/reward": 4.0})
    assert stop.finished
    assert "5 at step 0" in stop.finished


def test_a_set_without_its_turn_is_not_averaged_over() -> None:
    """The mean over another choice of sets is another quantity, here a lower one."""
    stop = EarlyStop(EvaluationConfig(patience=1), sets=sets("easy", "hard"))
    stop.observe(1, {"easy/reward": 9.0, "hard/reward": 3.0})
    stop.observe(2, {"hard/reward": 4.0})
    assert stop.finished is None
    assert stop.state_dict()["step"] == 1


def test_sets_without_trained_rewards_have_no_total_to_watch() -> None:
    watched = {**sets("a"), "b": PromptTaskConfig(path="", held_out=["light"])}
    stop = EarlyStop(EvaluationConfig(patience=1), sets=watched)
    stop.observe(1, {"a/reward": 5.0, "b/light": 9.0})
    stop.observe(2, {"a/reward": 5.0, "b/light": 9.5})
    assert stop.finished
    assert "best mean of a/reward" in stop.finished


@pytest.mark.parametrize(
    ("evaluation", "every", "said"),
    [
        ({"patience": 2, "watch": "a/ocr"}, 1, ""),
        ({"patience": 2, "watch": "b/ocr"}, 1, ""),
        ({"patience": 2, "watch": "a"}, 1, ""),
        ({"patience": 2}, 1, ""),
        ({"patience": 2}, 0, "stage.validate_every=0 makes none before the end"),
        ({"watch": "a/faces"}, 1, "is nothing that data.validation.a measures .its rewards: ocr"),
        ({"watch": "aa"}, 1, "no set of data.validation .there are: a, b.*Did you mean"),
        ({"watch": "b"}, 1, "all of data.validation.b are held out; name one behind a slash"),
    ],
)
def test_what_can_be_watched(evaluation: dict[str, Any], every: int, said: str) -> None:
    stage = GRPOConfig(
        validate_every=every,
        evaluation=EvaluationConfig(**evaluation),
        rewards={name: REWARD_KINDS["scene"]() for name in ("ocr", "faces")},
    )
    validation = {
        "a": PromptTaskConfig(path="a", rewards={"ocr": 1.0}),
        "b": PromptTaskConfig(path="b", held_out=["ocr"]),
    }
    config = RunConfig(model=LMConfig(), stage=stage, data=PromptDataConfig(validation=validation))
    found = [text for text in grpo_problems(config, stage=stage) if "stage.evaluation" in text]
    assert len(found) == bool(said)
    if said:
        assert re.search(said, found[0])
    del validation["a"]
    alone = [text for text in grpo_problems(config, stage=stage) if "all of them are held" in text]
    assert len(alone) == ("watch" not in evaluation)


def test_what_was_not_measured_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    stop = EarlyStop(EvaluationConfig(patience=1, watch="a/ocr"), sets=sets("a"))
    for step in (1, 2):
        stop.observe(step, {"a/reward": 5.0})
    assert stop.finished is None
    said = capsys.readouterr().out
    assert said.count("has no a/ocr, which stage.evaluation.patience=1 watches") == 1


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
    whole = observed(EarlyStop(config, sets=sets("s")), range(1, len(values) + 1))
    first = observed(EarlyStop(config, sets=sets("s")), range(1, cut + 1))
    resumed = EarlyStop(config, sets=sets("s"))
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    # The validation of the last step before the stop comes again.
    observed(resumed, range(max(1, cut), len(values) + 1))
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.finished == whole.finished


def test_another_watch_is_refused() -> None:
    saved = EarlyStop(EvaluationConfig(patience=1, watch="a"), sets=sets("a", "b")).state_dict()
    other = EarlyStop(EvaluationConfig(patience=1, watch="b"), sets=sets("a", "b"))
    with pytest.raises(CheckpointError, match=r"watched a/reward.*watch b/reward"):
        other.load_state_dict(saved)
