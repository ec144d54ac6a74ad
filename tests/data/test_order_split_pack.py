"""The three pure parts of a plan: shuffled order, cutting, packing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu35.data.order import SourceOrder, permutation
from emu35.data.pack import LENGTH_BITS, BestFit, best_fit_decreasing
from emu35.data.split import PictureTooLong, cut_points


def epoch_of(order: SourceOrder, *, epoch: int) -> list[int]:
    windows = -(-order.size // order.window)
    return [n for w in range(windows) for n in order.items(epoch=epoch, window=w).tolist()]


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda c: sum(c) > 0),
    window=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_an_epoch_holds_every_item_once(counts: list[int], window: int, seed: int) -> None:
    order = SourceOrder(items_per_shard=np.array(counts), window=window, seed=seed, name="a")
    for epoch in (0, 1, 0):
        assert sorted(epoch_of(order, epoch=epoch)) == list(range(sum(counts)))


def test_order_depends_on_seed_name_and_epoch_only() -> None:
    counts = np.array([50, 50, 50])

    def order(seed: int, name: str) -> SourceOrder:
        return SourceOrder(items_per_shard=counts, window=60, seed=seed, name=name)

    first = epoch_of(order(1, "a"), epoch=0)
    assert first == epoch_of(order(1, "a"), epoch=0)
    assert first != sorted(first)
    others = [order(1, "a"), order(2, "a"), order(1, "b")]
    assert all(
        first != epoch_of(other, epoch=epoch)
        for other, epoch in zip(others, (1, 0, 0), strict=True)
    )


def test_the_permutation_is_the_same_for_ever() -> None:
    # A run saved today must find the same order after any upgrade: these are recorded values.
    assert permutation(10, key="1234/scenes/0/0").tolist() == RECORDED


RECORDED = [4, 5, 6, 8, 9, 2, 1, 7, 3, 0]


def test_a_window_mixes_all_shards_it_spans() -> None:
    order = SourceOrder(items_per_shard=np.array([100] * 4), window=400, seed=0, name="a")
    shards = np.array(epoch_of(order, epoch=0)) // 100
    assert len(set(shards[:40].tolist())) == 4


@st.composite
def cut_cases(draw: st.DrawFn) -> tuple[int, np.ndarray, int]:
    spans: list[tuple[int, int]] = []
    place = 0
    for _ in range(draw(st.integers(0, 6))):
        start = place + draw(st.integers(0, 30))
        place = start + draw(st.integers(2, 25))
        spans.append((start, place))
    length = place + draw(st.integers(1, 60))
    return length, np.array(spans, np.int64).reshape(-1, 2), draw(st.integers(25, 60))


@given(cut_cases())
def test_pieces_fit_cover_everything_and_spare_pictures(
    case: tuple[int, np.ndarray, int],
) -> None:
    length, spans, limit = case
    starts = cut_points(length=length, spans=spans, limit=limit)
    ends = [*starts[1:], length]
    assert starts[0] == 0
    assert all(0 < end - start <= limit for start, end in zip(starts, ends, strict=True))
    for start, end in spans.tolist():
        assert not any(start < cut < end for cut in starts)


def test_a_cut_prefers_the_boundary_of_a_picture() -> None:
    spans = np.array([[30, 70]])
    assert cut_points(length=150, spans=spans, limit=100) == [0, 70]
    # Without a boundary in its second half, a piece is filled to the limit.
    assert cut_points(length=150, spans=np.array([[5, 20]]), limit=100) == [0, 100]


def test_a_picture_longer_than_the_row_is_reported_with_its_length() -> None:
    with pytest.raises(PictureTooLong) as caught:
        cut_points(length=50, spans=np.array([[10, 45]]), limit=30)
    assert caught.value.length == 35


def code(number: int, length: int) -> int:
    return number << LENGTH_BITS | length


@given(
    lengths=st.lists(st.integers(1, 50), max_size=120),
    limit=st.integers(1, 8),
    chunks=st.lists(st.integers(1, 5), min_size=1),
)
def test_best_fit_places_items_as_it_says(
    lengths: list[int], limit: int, chunks: list[int]
) -> None:
    """Against the rule written out plainly, however many rows are asked for at a time."""
    codes = [code(number, length) for number, length in enumerate(lengths)]
    expected, left = plain_best_fit(lengths, capacity=50, limit=limit)
    bins = BestFit(capacity=50, limit=limit)
    rows: list[list[int]] = []
    stream = iter(codes)
    for chunk in chunks:
        bins.fill(stream, rows=rows, until=len(rows) + chunk)
        assert len(bins.bins()) <= limit
    bins.fill(stream, rows=rows, until=len(codes) + 1)
    assert [[number >> LENGTH_BITS for number in row] for row in rows] == expected
    rest: list[list[int]] = []
    while (row := bins.pop()) is not None:
        rest.append([number >> LENGTH_BITS for number in row])
    assert rest == left


def plain_best_fit(
    lengths: list[int], *, capacity: int, limit: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows in the order in which they are emitted, and the bins left open, fullest first."""
    rows: list[list[int]] = []
    bins: list[list[int]] = []  # by age

    def free(row: list[int]) -> int:
        return capacity - sum(lengths[item] for item in row)

    for item, length in enumerate(lengths):
        fitting = [row for row in bins if free(row) >= length]
        if fitting:
            target = min(fitting, key=free)
        else:
            if len(bins) == limit:
                fullest = min(bins, key=free)
                bins = [row for row in bins if row is not fullest]
                rows.append(fullest)
            target = []
            bins.append(target)
        target.append(item)
        if free(target) == 0:
            bins = [row for row in bins if row is not target]
            rows.append(target)
    return rows, sorted(bins, key=free)


def test_best_fit_takes_the_bin_that_leaves_least_space() -> None:
    bins = BestFit(capacity=10, limit=3)
    rows: list[list[int]] = []
    lengths = (4, 7, 8, 3, 9, 7)
    bins.fill((code(n, length) for n, length in enumerate(lengths)), rows=rows, until=9)
    # 3 fills up the 7. Nothing has room for the last 7 and three bins are open: the fullest goes.
    assert [[number >> LENGTH_BITS for number in row] for row in rows] == [[1, 3], [4]]


@given(st.lists(st.integers(1, 40), max_size=80))
def test_best_fit_decreasing_keeps_every_item(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths=lengths, capacity=40)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in items) <= 40 for items in bins)
