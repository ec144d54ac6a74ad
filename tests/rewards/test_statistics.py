"""How scores develop: against numpy, over ranks, over a resumption; and when a run must stop."""

import json
import random
from collections.abc import Sequence

import numpy as np
import pytest

from emu35.config.grpo import Unscored as Policy
from emu35.errors import CheckpointError, DataError
from emu35.rewards.missing import Missing
from emu35.rewards.sample import Range, Score, Unscored
from emu35.rewards.scale import Scores, combine
from emu35.rewards.statistics import TOTAL, RewardStatistics, StepSums

# Microseconds since 1970, of which less is better, beside a share.
RANGES = {"late": Range(low=1.7e15 + 100.0, high=1.7e15), "share": Range(low=0.0, high=1.0)}
WEIGHTS = {"late": 1.0, "share": 3.0}


def scored(late: Score, share: Score) -> Scores:
    return combine({"late": late, "share": share}, ranges=RANGES, weights=WEIGHTS)


def steps(seed: int, *, count: int, shift: float = 0.0) -> list[list[Scores]]:
    rng = random.Random(seed)
    return [
        [
            scored(1.7e15 + rng.randrange(100), rng.gauss(0.5 + shift * (step >= 4), 0.05))
            for _ in range(12)
        ]
        for step in range(count)
    ]


def sums(answers: Sequence[Scores], *, task: str = "t2i") -> StepSums:
    found = StepSums(RANGES)
    for scores in answers:
        found.add(scores, task=task)
    return found


def test_statistics_are_those_of_all_scores_whatever_reward_counts_in() -> None:
    statistics = RewardStatistics(RANGES)
    given = steps(1, count=3)
    for answers in given:
        statistics.take([sums(answers)])
    every = [scores for answers in given for scores in answers]
    summaries = statistics.summaries()
    for name, start in (("late", 1.7e15), ("share", 0.0)):
        values = np.array([scores.raw[name] - start for scores in every])
        found = summaries["t2i", name]
        assert (found.mean or 0) - start == pytest.approx(values.mean(), abs=0.3)
        assert found.std == pytest.approx(values.std(), rel=1e-6)
        assert [(found.lowest or 0) - start, (found.highest or 0) - start] == pytest.approx(
            [values.min(), values.max()]
        )
        assert found.count == 36
    totals = [scores.total for scores in every if scores.total is not None]
    assert summaries["t2i", TOTAL].mean == pytest.approx(np.mean(totals))


def test_ranks_together_and_a_resumed_run_have_what_one_rank_has() -> None:
    one, two = RewardStatistics(RANGES, window=2), RewardStatistics(RANGES, window=2)
    for number, answers in enumerate(steps(2, count=9)):
        one.take([sums(answers)])
        parts = [sums(answers[:5]), sums(answers[5:7]), sums([]), sums(answers[7:])]
        sent = json.loads(json.dumps([part.to_json() for part in parts]))
        two.take([StepSums.from_json(part, ranges=RANGES) for part in sent])
        if number == 4:
            state = json.loads(json.dumps(two.state_dict(), allow_nan=False))
            two = RewardStatistics(RANGES, window=2)
            two.load_state_dict(state)
    for key, expected in one.summaries().items():
        found = two.summaries()[key]
        assert (found.count, found.clamp_rate) == (expected.count, expected.clamp_rate)
        assert [found.mean, found.std, found.drift] == pytest.approx(
            [expected.mean, expected.std, expected.drift]
        )


def test_clamped_and_missing_scores_are_shares_and_no_number_stands_for_none() -> None:
    statistics = RewardStatistics(RANGES)
    nothing = Unscored("blank")
    answers = [scored(nothing, share) for share in (0.5, 1.5, -0.5, 0.25)]
    statistics.take([sums(answers)])
    found = statistics.summaries()
    assert found["t2i", "share"].clamp_rate == 0.5
    assert found["t2i", "share"].unscored_rate == 0.0
    late = found["t2i", "late"]
    assert (late.count, late.mean, late.std, late.unscored_rate) == (0, None, None, 1.0)
    assert found["t2i", TOTAL].unscored_rate == 1.0
    again = RewardStatistics(RANGES)
    again.load_state_dict(json.loads(json.dumps(statistics.state_dict(), allow_nan=False)))
    assert again.summaries() == found


def test_drift_is_the_shift_of_the_newest_window_in_standard_deviations() -> None:
    statistics = RewardStatistics(RANGES, window=4)
    given = steps(3, count=12, shift=0.1)
    for number, answers in enumerate(given):
        statistics.take([sums(answers)])
        if number == 3:
            assert statistics.summaries()["t2i", "share"].drift is None
    raw = np.array([[scores.raw["share"] for scores in answers] for answers in given])
    expected = (raw[8:].mean() - raw[:4].mean()) / raw[:4].std()
    assert expected > 1
    assert statistics.summaries()["t2i", "share"].drift == pytest.approx(expected)
    assert abs(statistics.summaries()["t2i", "late"].drift or 0.0) < 0.6


def test_statistics_of_another_range_are_refused() -> None:
    state = RewardStatistics(RANGES).state_dict()
    other = RewardStatistics({"share": Range(low=0.0, high=2.0)})
    with pytest.raises(CheckpointError, match=r"share were kept for the range \[0.0, 1.0\]"):
        other.load_state_dict(state)


def test_answers_without_a_score_stop_the_run_as_configured() -> None:
    missing = Missing()
    for n in range(8):
        late: Score = Unscored(f"reward late: down {n}") if n < 2 else 1.7e15
        missing.add(scored(late, 0.5), trained=WEIGHTS)
    other = Missing()
    other.add(combine({"share": 0.5}, ranges=RANGES, weights={"share": 1}), trained=["share"])
    both = missing.plus(other)
    assert (both.answers, both.unscored, both.rewards) == (9, 2, {"late": 2})
    both.check(policy=Policy.drop, most=0.25)
    with pytest.raises(DataError, match=r"2 of 9 .*late failed at 2, as in: reward late: down 0"):
        both.check(policy=Policy.stop, most=1.0)
    with pytest.raises(DataError, match=r"a share of 0.22 above stage.max_unscored=0.2"):
        both.check(policy=Policy.drop, most=0.2)
    other.check(policy=Policy.stop, most=0.0)
    held_out = Missing()
    scores = combine({"share": 0.5, "late": Unscored("x")}, ranges=RANGES, weights={"share": 1})
    held_out.add(scores, trained=["share"])
    held_out.check(policy=Policy.stop, most=0.0)
