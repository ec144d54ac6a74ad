"""The plan: from index lengths to an endless stream of packed samples, the same on every rank.

``Planner.take(n)`` depends on the seed, the lengths and the cursor alone. Nothing is read, no rank
or worker number takes part, so a run may change its data-parallel size between two steps. The
state is the cursor itself: position of each source, tokens drawn from each, and the open bins.

Items of sources that are packed online meet in the open bins. A source that is packed offline is
packed once; what is shuffled and drawn are its rows, which hold its own documents only. One that
was packed into its shards has its rows already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emu35.config.data import Overlong, Packing
from emu35.data.mix import Mixture
from emu35.data.order import SourceOrder
from emu35.data.pack import BestFit, Item, OpenBin, PackedRows, rows_key
from emu35.errors import DataError

Ints = npt.NDArray[np.int64]

_STATE_VERSION = 1
_EARLIER = {"overlong": Overlong.cut.value}
"""What states without these settings were made with; every source of such a state was packed
online."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSource:
    """What the plan knows of a source: its share, the lengths of its items, and how it is packed.

    ``length`` is [N] in shard order, ``per_shard`` counts the items of each shard. ``rows`` are
    those of a source that lies packed; its ``packing`` is offline.
    """

    name: str
    ratio: float
    length: Ints
    per_shard: Ints
    fingerprint: str
    packing: Packing = Packing.online
    rows: PackedRows | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One packed row: its number in the global stream, and its items from left to right."""

    number: int
    items: list[Item]


class _Cursor:
    """Walks what one source has to give, epoch after epoch: its items, or its packed rows.

    ``length`` is [N], the tokens of each; ``per_shard`` as for :class:`SourceOrder`.
    """

    def __init__(self, *, length: Ints, per_shard: Ints, window: int, seed: int, name: str) -> None:
        self.order = SourceOrder(items_per_shard=per_shard, window=window, seed=seed, name=name)
        self._length = length
        self.seek(epoch=0, position=0)

    def seek(self, *, epoch: int, position: int) -> None:
        self.epoch = epoch
        self.position = position
        self._load()

    def _load(self) -> None:
        window = self.order.window
        items = self.order.items(epoch=self.epoch, window=self.position // window)
        self._first = self.position // window * window
        self._items: list[int] = items.tolist()
        self._lengths: list[int] = self._length[items].tolist()

    def advance(self) -> tuple[int, int]:
        """The next item (or row) number and its length."""
        place = self.position - self._first
        item, length = self._items[place], self._lengths[place]
        self.position += 1
        if place + 1 == len(self._items):
            if self.position == self.order.size:
                self.epoch += 1
                self.position = 0
            self._load()
        return item, length


class Planner:
    """Draws items by ratio, packs them into rows of ``sequence_length``, emits samples for ever.

    ``overlong`` is how the caller made items of documents that are too long: other items, another
    stream.
    """

    def __init__(
        self,
        *,
        sources: Sequence[PlannedSource],
        sequence_length: int,
        open_bins: int,
        shuffle_window: int,
        seed: int,
        overlong: Overlong = Overlong.cut,
    ) -> None:
        names = [source.name for source in sources]
        # Ties and references go by position, which must not depend on the order of a config file.
        assert names == sorted(names)
        self._sources = list(sources)
        self._identity: dict[str, Any] = {
            "seed": seed,
            "sequence_length": sequence_length,
            "open_bins": open_bins,
            "shuffle_window": shuffle_window,
            "overlong": overlong.value,
        }
        self.packed: dict[int, PackedRows] = {
            number: source.rows
            if source.rows is not None
            else PackedRows(
                lengths=source.length,
                capacity=sequence_length,
                key=rows_key(seed=seed, name=source.name),
            )
            for number, source in enumerate(sources)
            if source.packing is Packing.offline
        }
        self._cursors = [
            self._cursor(number, window=shuffle_window, seed=seed) for number in range(len(sources))
        ]
        self._mixture = Mixture(ratios=[source.ratio for source in sources])
        self._bins = BestFit(capacity=sequence_length, limit=open_bins)
        self.samples = 0

    def _cursor(self, number: int, *, window: int, seed: int) -> _Cursor:
        source, rows = self._sources[number], self.packed.get(number)
        length, per_shard = source.length, source.per_shard
        if rows is not None:
            length, per_shard = rows.length, rows.per_shard
            if per_shard is None:
                # Rows lie nowhere; blocks as large as the window change places every epoch.
                per_shard = np.diff(np.append(np.arange(0, len(rows), window), len(rows)))
        return _Cursor(
            length=length, per_shard=per_shard, window=window, seed=seed, name=source.name
        )

    def take(self, count: int) -> list[Sample]:
        """The next ``count`` samples of the stream."""
        first = self.samples
        rows = [self._next_row() for _ in range(count)]
        self.samples += count
        return [Sample(number=first + i, items=items) for i, items in enumerate(rows)]

    def _draw(self) -> tuple[int, int, int]:
        """The next source, what to take from it, and how long that is."""
        source = self._mixture.next_source()
        number, length = self._cursors[source].advance()
        self._mixture.add(source, tokens=length)
        return source, number, length

    def _next_row(self) -> list[Item]:
        while True:
            row = self._bins.pop_full()
            if row is None:
                source, number, length = self._draw()
                if source in self.packed:
                    return [Item(source, item) for item in self.packed[source].items(number)]
                row = self._bins.add(Item(source, number), length=length)
            if row is not None:
                return row

    def state_dict(self) -> dict[str, Any]:
        """The cursor as JSON-able values; independent of ranks, workers and prefetching."""
        return {
            "version": _STATE_VERSION,
            **self._identity,
            "samples": self.samples,
            "serial": self._bins.serial,
            "sources": {
                source.name: {
                    "ratio": source.ratio,
                    "items": len(source.length),
                    "fingerprint": source.fingerprint,
                    "packing": source.packing.value,
                    "epoch": cursor.epoch,
                    "position": cursor.position,
                    "drawn": drawn,
                }
                for source, cursor, drawn in zip(
                    self._sources, self._cursors, self._mixture.drawn, strict=True
                )
            },
            "bins": [
                [bin.free, bin.serial, [list(item) for item in bin.items]]
                for bin in self._bins.bins()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` without replay.

        Raises:
            DataError: naming everything that differs from when the state was saved.
        """
        changes = self._changes(state)
        if changes:
            raise DataError(
                "the data position cannot be restored, because the data changed since it was "
                "saved: " + "; ".join(changes) + ". Restore the data and settings, or start a "
                "new run"
            )
        saved = [state["sources"][source.name] for source in self._sources]
        for cursor, entry in zip(self._cursors, saved, strict=True):
            cursor.seek(epoch=entry["epoch"], position=entry["position"])
        self._mixture = Mixture(
            ratios=[source.ratio for source in self._sources],
            drawn=[entry["drawn"] for entry in saved],
        )
        bins = [
            OpenBin(free=free, serial=serial, items=[Item(*item) for item in items])
            for free, serial, items in state["bins"]
        ]
        self._bins.restore(bins, serial=state["serial"])
        self.samples = state["samples"]

    def _changes(self, state: Mapping[str, Any]) -> list[str]:
        changes: list[str] = []
        current = {"version": _STATE_VERSION, **self._identity}
        for name, value in current.items():
            before = state.get(name, _EARLIER.get(name))
            if before != value:
                changes.append(f"{name} was {before} and is {value}")
        saved: Mapping[str, Any] = state.get("sources", {})
        names = [source.name for source in self._sources]
        if sorted(saved) != names:
            changes.append(f"sources were {sorted(saved)} and are {names}")
        for source in self._sources:
            entry = saved.get(source.name)
            if entry is None:
                continue
            if entry["fingerprint"] != source.fingerprint:
                changes.append(
                    f"shards of source {source.name!r} changed ({entry['items']} pieces then, "
                    f"{len(source.length)} now)"
                )
            packing = entry.get("packing", Packing.online.value)
            if packing != source.packing.value:
                changes.append(
                    f"packing of source {source.name!r} was {packing} and is {source.packing}"
                )
            if entry["ratio"] != source.ratio:
                changes.append(
                    f"ratio of source {source.name!r} was {entry['ratio']} and is {source.ratio}"
                )
        return changes
