"""Texts against texts: no picture, no model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu35.rewards.text_fidelity import Normal, edit_distance, fidelity

PLAIN = Normal()
EXACT = Normal(ignore_case=False, ignore_spaces=False)


def plain_distance(a: str, b: str) -> int:
    """The definition, word for word."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        plain_distance(a[1:], b) + 1,
        plain_distance(a, b[1:]) + 1,
        plain_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


@settings(max_examples=60, deadline=None)
@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_edit_distance_is_the_fewest_changes(a: str, b: str) -> None:
    assert edit_distance(a, b) == plain_distance(a, b)


@pytest.mark.parametrize(
    ("wanted", "found", "score"),
    [
        (["BUS"], ["BUS"], 1),
        (["BUS"], ["bus"], 1),
        (["BUS"], ["BUT"], 2 / 3),
        (["BUS"], [], 0),
        (["BUS"], ["BUS", "TAXI"], 3 / 7),
        (["Hello World"], ["Hello", "World"], 1),
        (["Open", "Shop"], ["SHOP", "OPEN"], 1),
        (["Open", "Shop"], ["SHOP"], 0.5),
        (["Open daily", "Shop"], ["Open", "daily", "Shop"], 1),
        (["ＢＵＳ １"], ["BUS 1"], 1),  # noqa: RUF001 - full-width letters are the point
        (["你好"], ["你坏"], 0.5),
    ],
)
def test_fidelity_counts_characters_and_lets_items_stand_anywhere(
    wanted: list[str], found: list[str], score: float
) -> None:
    assert fidelity(wanted, found, normal=PLAIN) == pytest.approx(score)


def test_case_and_spaces_count_where_they_are_asked_for() -> None:
    assert fidelity(["Bus 1"], ["bus 1"], normal=EXACT) == pytest.approx(4 / 5)
    assert fidelity(["Bus 1"], ["Bus1"], normal=EXACT) == pytest.approx(4 / 5)


LINES = st.lists(st.text("abAB ", min_size=1, max_size=6), max_size=4)


@settings(max_examples=100, deadline=None)
@given(LINES.filter(len), LINES)
def test_fidelity_lies_in_its_range_and_is_whole_only_for_the_same_characters(
    wanted: list[str], found: list[str]
) -> None:
    score = fidelity(wanted, found, normal=PLAIN)
    assert 0 <= score <= 1
    same = sorted("".join(map(PLAIN, wanted))) == sorted("".join(map(PLAIN, found)))
    assert score < 1 or same
    assert fidelity(wanted, wanted[::-1], normal=PLAIN) == 1
