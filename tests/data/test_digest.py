"""The digest of a stream: whoever reads the same has the same, and nobody else."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from emu35.data.digest import add_digests, shown, stream_digest

ROWS = st.lists(st.lists(st.integers(0, 2**62), min_size=1, max_size=5), min_size=1, max_size=6)


def digest(rows: list[list[int]], *, first: int = 0) -> int:
    codes = np.array([code for row in rows for code in row], dtype=np.int64)
    return stream_digest(codes, lengths=[len(row) for row in rows], first=first)


@given(ROWS, st.integers(0, 6), st.integers(0, 2**40))
def test_it_does_not_matter_how_much_is_taken_at_once(
    rows: list[list[int]], cut: int, first: int
) -> None:
    head, tail = rows[:cut], rows[cut:]
    joined = add_digests(digest(head, first=first), digest(tail, first=first + len(head)))
    assert joined == digest(rows, first=first)


@given(ROWS, st.data())
def test_any_piece_that_is_another_or_elsewhere_changes_it(
    rows: list[list[int]], data: st.DataObject
) -> None:
    row = data.draw(st.integers(0, len(rows) - 1))
    place = data.draw(st.integers(0, len(rows[row]) - 1))
    other = [list(each) for each in rows]
    other[row][place] += 1
    assert shown(digest(other)) != shown(digest(rows))
    turned = [*rows[1:], rows[0]]
    if turned != rows:
        assert shown(digest(turned)) != shown(digest(rows))
    backwards = [list(reversed(each)) for each in rows]
    if backwards != rows:
        assert shown(digest(backwards)) != shown(digest(rows))
    assert shown(digest(rows, first=1)) != shown(digest(rows))
    assert shown(digest(rows)) == int(shown(digest(rows)))
