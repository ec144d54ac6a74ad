"""Advantages against the formulas of the papers, written out with numpy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu35.config.grpo import AdvantageConfig, ZeroVariance
from emu35.stages.grpo.advantage import GroupSums, Teaching, group_advantages

SCORES = st.floats(min_value=1, max_value=10)
GROUPS = st.lists(st.none() | SCORES, min_size=2, max_size=12)


def _reference(
    totals: list[float | None], *, divide_by_std: bool, epsilon: float
) -> list[float | None]:
    """GRPO's eq. 3 by numpy's mean and unbiased std, over the answers that have a score."""
    known = np.array([total for total in totals if total is not None])
    scale = known.std(ddof=1) + epsilon if divide_by_std else 1.0
    return [None if total is None else (total - known.mean()) / scale for total in totals]


@given(totals=GROUPS, divide=st.booleans(), epsilon=st.sampled_from([1e-6, 0.1]))
def test_advantages_are_those_of_the_paper(
    totals: list[float | None], divide: bool, epsilon: float
) -> None:
    known = [total for total in totals if total is not None]
    config = AdvantageConfig(divide_by_std=divide, epsilon=epsilon)
    found = group_advantages(totals, config=config)
    if len(known) < 2:
        assert found.teaching is Teaching.too_few
        assert found.values == (None,) * len(totals)
        return
    if max(known) - min(known) <= 1e-6:
        assert found.teaching is Teaching.zero_variance
        return
    assert found.teaching is Teaching.compared
    expected = _reference(totals, divide_by_std=divide, epsilon=epsilon)
    assert [value is None for value in found.values] == [value is None for value in expected]
    for value, reference in zip(found.values, expected, strict=True):
        if value is not None and reference is not None:
            assert value == pytest.approx(reference, rel=1e-9, abs=1e-9)
    assert math.fsum(v for v in found.values if v is not None) == pytest.approx(0, abs=1e-6)


def test_std_is_the_unbiased_one() -> None:
    found = group_advantages([2.0, 4.0], config=AdvantageConfig())
    assert found.std == pytest.approx(math.sqrt(2))
    assert found.values == pytest.approx((-1 / math.sqrt(2), 1 / math.sqrt(2)), rel=1e-5)


def test_dr_grpo_does_not_divide() -> None:
    config = AdvantageConfig(divide_by_std=False)
    assert group_advantages([1.0, 4.0, 7.0], config=config).values == (-3.0, 0.0, 3.0)


def test_an_unscored_answer_changes_nothing_for_the_others() -> None:
    config = AdvantageConfig()
    among_scored = group_advantages([3.0, 9.0, 6.0], config=config).values
    with_gaps = group_advantages([None, 3.0, 9.0, None, 6.0], config=config).values
    assert with_gaps == (None, *among_scored[:2], None, among_scored[2])


@pytest.mark.parametrize("totals", [[None, None, None], [None, 5.0, None], [5.0]])
def test_fewer_than_two_scores_teach_nothing(totals: list[float | None]) -> None:
    for rule in ZeroVariance:
        found = group_advantages(totals, config=AdvantageConfig(zero_variance=rule))
        assert found.values == (None,) * len(totals)
        assert found.teaching is Teaching.too_few


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (ZeroVariance.keep, (0.0, 0.0, None, 0.0)),
        (ZeroVariance.drop, (None,) * 4),
        (ZeroVariance.resample, (None,) * 4),
    ],
)
def test_a_group_of_equal_rewards(rule: ZeroVariance, expected: tuple[float | None, ...]) -> None:
    """Kept it has advantage 0, exactly: rounding noise must not become advantages near 1."""
    noise = 1e-8
    found = group_advantages(
        [7.3, 7.3 + noise, None, 7.3 - noise], config=AdvantageConfig(zero_variance=rule)
    )
    assert found.teaching is Teaching.zero_variance
    assert found.values == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="answer 1"):
        group_advantages([3.0, bad], config=AdvantageConfig())


@given(st.lists(GROUPS, min_size=1, max_size=6), st.integers(min_value=0, max_value=6))
def test_sums_add_over_ranks_and_count_everything(
    groups: list[list[float | None]], cut: int
) -> None:
    compared = [group_advantages(totals, config=AdvantageConfig()) for totals in groups]
    parts = [GroupSums.of(compared[:cut]).numbers(), GroupSums.of(compared[cut:]).numbers()]
    added = GroupSums.from_numbers([sum(pair) for pair in zip(*parts, strict=True)])
    assert added.numbers() == pytest.approx(GroupSums.of(compared).numbers())
    scores = [total for totals in groups for total in totals if total is not None]
    assert added.answers == sum(len(totals) for totals in groups)
    assert added.scored == len(scores)
    assert added.compared + added.zero_variance + added.too_few == added.groups == len(groups)
    if scores:
        assert added.metrics()["reward"] == pytest.approx(np.mean(scores))
    else:
        assert "reward" not in added.metrics(), "no mean of nothing"


def test_metrics_name_the_shares() -> None:
    groups = [[1.0, 10.0], [5.0, 5.0], [None, 4.0], [None, None]]
    sums = GroupSums.of(group_advantages(group, config=AdvantageConfig()) for group in groups)
    assert sums.metrics() == pytest.approx(
        {
            "reward": 5.0,
            "reward_std": np.std([1, 10], ddof=1) / 2,
            "groups_zero_variance": 1 / 4,
            "groups_too_few": 2 / 4,
            "answers_unscored": 3 / 8,
            "answers_trained": 4 / 8,
            "answers_positive": 1 / 4,
        }
    )
