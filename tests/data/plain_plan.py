"""The planner's rules written out plainly: one draw at a time, nothing kept but what they name."""

from collections.abc import Iterator

import numpy as np

from emu35.config.data import Interpolation, Packing, ratio_at, ratio_points
from emu35.data.order import SourceOrder
from emu35.data.pack import PackedRows
from emu35.data.planned import PlannedSource

Piece = tuple[int, int]
"""A source and the number of an item of it."""


def plain_plan(
    sources: list[PlannedSource],
    *,
    row: int,
    open_bins: int,
    window: int,
    seed: int,
    between: Interpolation,
    samples_per_step: int,
    most: int,
) -> list[list[Piece]]:
    """The first ``most`` rows of the stream; fewer where it ends."""
    walks = [
        _units(n, source, row=row, window=window, seed=seed) for n, source in enumerate(sources)
    ]
    waiting: list[list[list[Piece]]] = [[] for _ in sources]
    points = [ratio_points(ratio=s.ratio, schedule=s.schedule) for s in sources]
    drawn, base, base_total = [0] * len(sources), [0] * len(sources), 0
    ended = [False] * len(sources)
    shares: list[float] | None = None
    rows: list[list[Piece]] = []
    bins: list[list[Piece]] = []

    def tokens(pieces: list[Piece]) -> int:
        return sum(int(sources[source].length[item]) for source, item in pieces)

    while len(rows) < most:
        step = len(rows) // samples_per_step
        ratios = [
            0.0 if ended[n] else ratio_at(points[n], step, between=between)
            for n in range(len(sources))
        ]
        if sum(ratios) == 0:
            if not bins:
                return rows
            fullest = max(bins, key=tokens)
            bins = [pieces for pieces in bins if pieces is not fullest]
            rows.append(fullest)
            continue
        now = [ratio / sum(ratios) for ratio in ratios]
        since = sum(drawn) - base_total
        if shares is not None and now != shares:
            base = [b + round(share * since) for b, share in zip(base, shares, strict=True)]
            base_total, since = base_total + since, 0
        shares = now
        live = [n for n in range(len(sources)) if now[n] > 0]
        source = min(live, key=lambda n: ((drawn[n] - base[n]) / now[n], n))
        if not waiting[source]:
            unit = next(walks[source], None)
            if unit is None:
                ended[source] = True
                continue
            waiting[source] = unit
        pieces = waiting[source].pop(0)
        drawn[source] += tokens(pieces)
        if sources[source].packing is Packing.offline:
            rows.append(pieces)
            continue
        fitting = [held for held in bins if row - tokens(held) >= tokens(pieces)]
        if fitting:
            target = max(fitting, key=tokens)
        else:
            if len(bins) == open_bins:
                fullest = max(bins, key=tokens)
                bins = [held for held in bins if held is not fullest]
                rows.append(fullest)
            target: list[Piece] = []
            bins.append(target)
        target += pieces
        if tokens(target) == row:
            bins = [held for held in bins if held is not target]
            rows.append(target)
    return rows[:most]


def _units(
    number: int, source: PlannedSource, *, row: int, window: int, seed: int
) -> Iterator[list[list[Piece]]]:
    """Documents, each as its pieces (or a row before packed, as one), up to the source's end."""
    if source.packing is Packing.offline:
        packed = PackedRows(lengths=source.length, capacity=row, key=f"{seed}/{source.name}/rows")
        units = [[[(number, item) for item in packed.items(r)]] for r in range(len(packed))]
        blocks = range(0, len(units), window)
        per_shard = [min(window, len(units) - begin) for begin in blocks]
    else:
        documents = (
            np.arange(len(source.length)) if source.document is None else source.document
        ).tolist()
        shards = np.repeat(np.arange(len(source.per_shard)), source.per_shard).tolist()
        units, per_shard = [], [0] * len(source.per_shard)
        for item, document in enumerate(documents):
            if item and documents[item - 1] == document:
                units[-1].append([(number, item)])
            else:
                units.append([[(number, item)]])
                per_shard[shards[item]] += 1
    order = SourceOrder(
        items_per_shard=np.array(per_shard), window=window, seed=seed, name=source.name
    )
    most = None if source.epochs is None else max(1, round(source.epochs * len(units)))
    count = total = epoch = 0
    while True:
        for window_number in range(-(-len(units) // window)):
            for unit in order.items(epoch=epoch, window=window_number).tolist():
                pieces = units[unit]
                total += sum(int(source.length[item]) for piece in pieces for _, item in piece)
                count += 1
                if most is not None and count > most:
                    return
                if source.max_tokens is not None and total > source.max_tokens:
                    return
                yield [list(piece) for piece in pieces]
        epoch += 1
