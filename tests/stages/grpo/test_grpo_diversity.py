"""Collapse shows in the figures; the figures do not depend on how groups are dealt out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu35.stages.grpo.diversity import Codes, DiversitySums


def _picture(seed: int, *, codes: int = 256, side: int = 8) -> Codes:
    return np.random.default_rng(seed).integers(0, codes, (side, side))


def test_a_collapsed_group_and_a_varied_one() -> None:
    varied = DiversitySums.of([[[_picture(seed)] for seed in range(4)]]).metrics()
    collapsed = DiversitySums.of([[[_picture(0)] for _ in range(4)]]).metrics()
    assert varied["diversity/images"] == 1
    assert varied["diversity/difference"] > 0.98
    assert collapsed["diversity/images"] == 1 / 4
    assert collapsed["diversity/difference"] == 0
    flat = DiversitySums.of([[[np.full((8, 8), 3)], [np.full((8, 8), 3)]]]).metrics()
    assert flat["diversity/code_entropy"] == 0


def test_numbers_by_hand() -> None:
    a, b = np.array([[0, 1], [2, 3]]), np.array([[0, 1], [2, 0]])
    metrics = DiversitySums.of([[[a], [b], [a]]]).metrics()
    assert metrics["diversity/images"] == pytest.approx(2 / 3)
    assert metrics["diversity/difference"] == pytest.approx((1 / 4 + 0 + 1 / 4) / 3)
    shares = np.array([4, 3, 3, 2]) / 12
    assert metrics["diversity/code_entropy"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_another_size_or_a_missing_picture_differs_in_everything() -> None:
    a = _picture(1)
    other_size = DiversitySums.of([[[a], [a[:4]]]])
    assert other_size.metrics()["diversity/difference"] == 1
    story = DiversitySums.of([[[a, a], [a]]])
    assert story.metrics()["diversity/difference"] == pytest.approx(1 / 2)
    assert story.metrics()["diversity/images"] == pytest.approx(2 / 3)


def test_dtypes_do_not_make_pictures_distinct() -> None:
    a = _picture(1)
    assert DiversitySums.of([[[a], [a.astype(np.int32)]]]).distinct == 1


def test_answers_without_pictures_take_no_part() -> None:
    assert DiversitySums.of([[[], []], []]).metrics() == {}
    alone = DiversitySums.of([[[_picture(0)], []]]).metrics()
    assert alone["diversity/images"] == 1
    assert "diversity/difference" not in alone, "one picture differs from nothing"
    assert math.isfinite(alone["diversity/code_entropy"])


@given(
    st.lists(st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=4), min_size=1, max_size=4),
    st.integers(0, 4),
)
def test_sums_add_over_ranks(seeds: list[list[list[int]]], cut: int) -> None:
    groups = [[[_picture(s, codes=4, side=2) for s in answer] for answer in g] for g in seeds]
    parts = DiversitySums.of(groups[:cut]) + DiversitySums.of(groups[cut:])
    assert parts.numbers() == pytest.approx(DiversitySums.of(groups).numbers())
    for name, value in parts.metrics().items():
        assert 0 <= value <= (1 if name != "diversity/code_entropy" else math.log(4) + 1e-9)
