"""The plan: from index lengths to an endless stream of packed samples, the same on every rank.

``Planner.take(n)`` depends on the seed, the lengths and the cursor alone. Nothing is read, no rank
or worker number takes part, so a run may change its data-parallel size between two steps. The
state is the cursor itself: position of each source, tokens drawn from each, and the open bins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emu35.data.mix import Mixture
from emu35.data.order import SourceOrder
from emu35.data.pack import BestFit, Item, OpenBin
from emu35.errors import DataError

Ints = npt.NDArray[np.int64]

_STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSource:
    """What the plan knows of a source: its share, and the lengths of its items.

    ``length`` is [N] in shard order, ``per_shard`` counts the items of each shard.
    """

    name: str
    ratio: float
    length: Ints
    per_shard: Ints
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One packed row: its number in the global stream, and its items from left to right."""

    number: int
    items: list[Item]


class _Cursor:
    """Walks the items of one source, epoch after epoch."""

    def __init__(self, *, source: PlannedSource, window: int, seed: int) -> None:
        self.order = SourceOrder(
            items_per_shard=source.per_shard, window=window, seed=seed, name=source.name
        )
        self._length = source.length
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
        """The next item number and its length."""
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
    """Draws items by ratio, packs them into rows of ``sequence_length``, emits samples for ever."""

    def __init__(
        self,
        *,
        sources: Sequence[PlannedSource],
        sequence_length: int,
        open_bins: int,
        shuffle_window: int,
        seed: int,
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
        }
        self._cursors = [
            _Cursor(source=source, window=shuffle_window, seed=seed) for source in sources
        ]
        self._mixture = Mixture(ratios=[source.ratio for source in sources])
        self._bins = BestFit(capacity=sequence_length, limit=open_bins)
        self.samples = 0

    def take(self, count: int) -> list[Sample]:
        """The next ``count`` samples of the stream."""
        first = self.samples
        bins, mixture, cursors = self._bins, self._mixture, self._cursors
        rows: list[list[Item]] = []
        while len(rows) < count:
            row = bins.pop_full()
            if row is None:
                source = mixture.next_source()
                item, length = cursors[source].advance()
                mixture.add(source, tokens=length)
                row = bins.add(Item(source, item), length=length)
            if row is not None:
                rows.append(row)
        self.samples += count
        return [Sample(number=first + i, items=items) for i, items in enumerate(rows)]

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
            if state.get(name) != value:
                changes.append(f"{name} was {state.get(name)} and is {value}")
        before: Mapping[str, Any] = state.get("sources", {})
        names = [source.name for source in self._sources]
        if sorted(before) != names:
            changes.append(f"sources were {sorted(before)} and are {names}")
        for source in self._sources:
            entry = before.get(source.name)
            if entry is None:
                continue
            if entry["fingerprint"] != source.fingerprint:
                changes.append(
                    f"shards of source {source.name!r} changed ({entry['items']} pieces then, "
                    f"{len(source.length)} now)"
                )
            if entry["ratio"] != source.ratio:
                changes.append(
                    f"ratio of source {source.name!r} was {entry['ratio']} and is {source.ratio}"
                )
        return changes
