"""The pieces of rows: what an index keeps gives their lengths back, and nonsense is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu35.data.pieces import check_pieces, piece_lengths, piece_table, read_pieces

parts = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6
)


def facts_of(row: list[tuple[int, int, int]]) -> dict[str, Any]:
    """The JSON of a row; each piece has tokens, and so many of its document before and after."""
    pieces: list[dict[str, Any]] = []
    start = 0
    for number, (tokens, before, after) in enumerate(row):
        piece = {"id": str(number), "source": "s", "start": start, "tokens": tokens}
        pieces.append({**piece, "first": before, "of": before + tokens + after})
        start += tokens
    return {"id": "row", "source": "s", "tokens": start, "images": [], "pieces": pieces}


@given(rows=st.lists(parts, min_size=1, max_size=6))
def test_an_index_has_the_length_of_every_piece(rows: list[list[tuple[int, int, int]]]) -> None:
    facts = [facts_of(row) for row in rows]
    arrays = {
        "piece_row": np.cumsum([0, *(len(row) for row in rows)]),
        "pieces": np.array([entry for fact in facts for entry in piece_table(fact)]),
        "length": np.array([fact["tokens"] for fact in facts]),
    }
    check_pieces(**arrays)
    assert piece_lengths(**arrays).tolist() == [tokens for row in rows for tokens, _, _ in row]
    whole = [piece.is_whole for fact in facts for piece in read_pieces(fact)]
    assert whole == [not before and not after for row in rows for _, before, after in row]


ROWS = {
    "piece_row": np.array([0, 2, 3]),
    "pieces": np.array([[0, 0, 4], [4, 2, 9], [0, 0, 5]]),
    "length": np.array([7, 5]),
}


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("piece_row", 0, 1),
        ("piece_row", 1, 0),
        ("piece_row", 1, 3),
        ("piece_row", 2, 2),
        ("piece_row", 2, -1),
        ("pieces", (0, 0), 1),
        ("pieces", (1, 0), 0),
        ("pieces", (1, 0), 7),
        ("pieces", (1, 1), 7),
        ("pieces", (1, 1), -1),
        ("pieces", (2, 2), 4),
        ("length", 0, 4),
        ("length", 1, 0),
    ],
)
def test_pieces_that_do_not_cover_their_rows_are_refused(name: str, place: Any, value: int) -> None:
    check_pieces(**ROWS)
    changed = {key: array.copy() for key, array in ROWS.items()}
    changed[name][place] = value
    with pytest.raises(ValueError, match=r"piece|rows"):
        check_pieces(**changed)


@pytest.mark.parametrize(
    "change",
    [{"start": 1}, {"tokens": 0}, {"tokens": 3}, {"tokens": "x"}, {"id": None, "start": None}],
)
def test_json_that_does_not_fit_its_row_is_refused(change: dict[str, Any]) -> None:
    facts = facts_of([(2, 0, 0), (4, 0, 0)])
    facts["pieces"][0] |= change
    with pytest.raises((ValueError, TypeError)):
        read_pieces(facts)
    with pytest.raises(ValueError, match="have 2 of its 3 tokens"):
        read_pieces({**facts_of([(2, 0, 0)]), "tokens": 3})
