"""One scale for all rewards, and the mean that is trained on."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judged import Faulty, config

from emu35.config.reward import FunctionRewardConfig, RewardConfig, SceneRewardConfig
from emu35.errors import ConfigError
from emu35.rewards.build import build_rewards
from emu35.rewards.sample import Range, Unscored
from emu35.rewards.scale import combine, mapped, source_ranges

UNIT = Range(low=0.0, high=1.0)


@pytest.mark.parametrize(
    ("raw", "source", "value", "clamped"),
    [
        (0.0, UNIT, 1.0, False),
        (1.0, UNIT, 10.0, False),
        (0.5, UNIT, 5.5, False),
        (1.5, UNIT, 10.0, True),
        (-0.1, UNIT, 1.0, True),
        (0.25, Range(low=1.0, high=0.0), 7.75, False),
        (2.0, Range(low=1.0, high=0.0), 1.0, True),
        (700.0, Range(low=0.0, high=1000.0), 7.3, False),
    ],
)
def test_scores_are_mapped_to_one_to_ten(
    raw: float, source: Range, value: float, clamped: bool
) -> None:
    found = mapped(raw, source=source)
    assert found.value == pytest.approx(value)
    assert found.clamped is clamped


numbers = st.floats(-1e6, 1e6)


@given(numbers, numbers, st.floats(-100, 100), st.floats(0.5, 100), st.booleans())
def test_better_is_never_worse_and_never_beyond_the_scale(
    one: float, other: float, low: float, width: float, down: bool
) -> None:
    source = Range(low=low + width, high=low) if down else Range(low=low, high=low + width)
    worse, better = sorted((one, other), reverse=down)
    assert 1.0 <= mapped(worse, source=source).value <= mapped(better, source=source).value <= 10.0


def test_the_total_is_the_weighted_mean_of_what_is_trained_on() -> None:
    ranges = {"a": UNIT, "b": Range(low=0.0, high=100.0), "watched": UNIT}
    raw = {"a": 1.0, "b": 0.0, "watched": 0.5}
    scores = combine(raw, ranges=ranges, weights={"a": 2.0, "b": 1.0})
    assert scores.total == pytest.approx((2 * 10 + 1 * 1) / 3)
    assert scores.mapped == {"a": 10.0, "b": 1.0, "watched": 5.5}
    assert scores.raw == raw
    assert combine(raw, ranges=ranges, weights={}).total is None


def test_a_reward_that_counts_in_thousands_weighs_no_more_than_its_weight() -> None:
    ranges = {"share": UNIT, "points": Range(low=0.0, high=5000.0)}
    weights = {"share": 1.0, "points": 1.0}

    def total(share: float, points: float) -> float:
        found = combine({"share": share, "points": points}, ranges=ranges, weights=weights).total
        assert found is not None
        return found

    assert total(0.8, 1000.0) == pytest.approx(total(0.2, 4000.0))
    assert total(0.5, 1e9) == total(0.5, 5000.0) <= 10.0


def test_a_missing_score_leaves_no_total_and_no_number() -> None:
    ranges = {"a": UNIT, "b": UNIT}
    one = combine({"a": 2.0, "b": Unscored("no face")}, ranges=ranges, weights={"a": 1, "b": 1})
    assert one.total is None
    assert one.unscored == {"b": "no face"}
    assert one.clamped == {"a"}
    assert one.mapped == {"a": 10.0}
    held_out = combine({"a": 1.0, "b": Unscored("no face")}, ranges=ranges, weights={"a": 1})
    assert held_out.total == 10.0


def test_a_range_is_the_users_else_the_rewards_own_else_an_error() -> None:
    rewards = {"a": Faulty(lambda item: 0.0), "b": Faulty(lambda item: 0.0)}
    configs = {"a": config(low=3.0, high=1.0), "b": config()}
    found = source_ranges(rewards, configs=configs)
    assert found == {"a": Range(low=3.0, high=1.0), "b": UNIT}
    rewards["b"].range = Range(low=float("-inf"), high=float("inf"))
    with pytest.raises(ConfigError, match=r"stage.rewards.b has no range .* give low and high"):
        source_ranges(rewards, configs=configs)


def test_rewards_are_built_by_kind_and_all_problems_told_at_once() -> None:
    own: dict[str, Any] = {"low": 0.0, "high": 1.0}
    configs: dict[str, RewardConfig] = {
        "scene": SceneRewardConfig(),
        "mine": FunctionRewardConfig(function="math:hypot", **own),
    }
    assert list(build_rewards(configs)) == ["scene", "mine"]
    configs["mine"] = FunctionRewardConfig(function="math:hypott", **own)
    configs["other"] = FunctionRewardConfig(function="no.such:thing", **own)
    with pytest.raises(ConfigError) as caught:
        build_rewards(configs)
    assert "stage.rewards.mine: reward 'math:hypott': hypott does not exist" in str(caught.value)
    assert "stage.rewards.other: " in str(caught.value)
