"""The plan: from index lengths to a stream of packed samples, the same on every rank.

``Planner.take(n)`` depends on the seed, the lengths and the cursor alone. Nothing is read, no rank
or worker number takes part, so a run may change its data-parallel size between two steps. The
state is the cursor itself: position of each source, tokens drawn from each, and the open bins.

Items of sources that are packed online meet in the open bins. A source that is packed offline is
packed once; what is shuffled and drawn are its rows, which hold its own documents only. One that
was packed into its shards has its rows already.

Ratios may change with the steps, and a source may end: then the others share its ratio, and what
of it lies in open bins still comes out. Once all have ended the bins are emptied, and then there
is no sample any more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from emu35.config.data import Interpolation, Overlong, Packing, ratio_at, ratio_points
from emu35.data.cursor import Cursor, document_units, row_units
from emu35.data.digest import add_digests, shown, stream_digest
from emu35.data.mix import Mixture, Stretch
from emu35.data.order import SourceOrder
from emu35.data.pack import (
    LENGTH_BITS,
    LENGTH_MASK,
    ROW,
    BestFit,
    Item,
    OpenBin,
    PackedRows,
    rows_key,
)
from emu35.data.planned import STATE_VERSION, PlannedSource, changes_since
from emu35.errors import DataError

Ints = npt.NDArray[np.int64]

_new_item = cast(
    "Callable[[type[Item], tuple[int, int]], Item]",
    tuple.__new__,  # pyright: ignore[reportUnknownMemberType]
)
"""Like ``Item(*pair)``, without a call into Python."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One packed row: its number in the global stream, and its items from left to right."""

    number: int
    items: list[Item]


@dataclass(kw_only=True, slots=True)
class _Walk:
    """A source on its way: ``tokens`` and ``documents`` have come out in samples, a document with
    its first piece; ``ended`` is the sample before which it ended."""

    source: PlannedSource
    cursor: Cursor
    points: Mapping[int, float]
    tokens: int = 0
    documents: int = 0
    ended: int | None = None


class Planner:
    """Draws items by ratio, packs them into rows of ``sequence_length``, emits samples.

    ``overlong`` is how the caller made items of documents that are too long: other items, another
    stream. Steps of schedules are ``samples_per_step`` samples; ``between`` their points ratios
    stay or move.

    Attributes:
        packed: the rows of the sources that are packed offline, by the source's position.
        samples: how many have been taken.
        digest: of all of them (:mod:`emu35.data.digest`).
        notes: what happened in words, for the caller to tell and to clear.
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
        between: Interpolation = Interpolation.steps,
        samples_per_step: int = 1,
    ) -> None:
        names = [source.name for source in sources]
        # Ties and references go by position, which must not depend on the order of a config file.
        assert names == sorted(names)
        self._sources = list(sources)
        self._between, self._samples_per_step = between, samples_per_step
        self._identity: dict[str, Any] = {
            "seed": seed,
            "sequence_length": sequence_length,
            "open_bins": open_bins,
            "shuffle_window": shuffle_window,
            "overlong": overlong.value,
        }
        if any(source.schedule for source in sources):
            self._identity |= {"schedule": between.value, "samples_per_step": samples_per_step}
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
        counts = np.array([len(source.length) for source in sources], np.int64)
        self._first_item: Ints = np.cumsum(counts) - counts
        self._walks = [
            self._walk(number, window=shuffle_window, seed=seed) for number in range(len(sources))
        ]
        self._bins = BestFit(capacity=sequence_length, limit=open_bins)
        self._mixture = Mixture(ratios=self._ratios(0))
        self._stretch: Stretch | None = None
        self._next_change = self._change_after(0)
        self.samples, self.digest = 0, 0
        self.notes: list[str] = []

    def _walk(self, number: int, *, window: int, seed: int) -> _Walk:
        source, rows = self._sources[number], self.packed.get(number)
        if rows is None:
            units = document_units(
                length=source.length, per_shard=source.per_shard, document=source.document
            )
        else:
            units = row_units(rows, document=source.document, window=window)
        order = SourceOrder(
            items_per_shard=units.per_shard, window=window, seed=seed, name=source.name
        )
        cursor = Cursor(
            units,
            order=order,
            number=int(self._first_item[number]),
            epochs=source.epochs,
            max_tokens=source.max_tokens,
        )
        points = ratio_points(ratio=source.ratio, schedule=source.schedule)
        return _Walk(source=source, cursor=cursor, points=points)

    @property
    def available(self) -> int | None:
        """About how many tokens all sources hold until they end; None: one has no end."""
        each = [walk.cursor.available for walk in self._walks]
        known = [tokens for tokens in each if tokens is not None]
        return sum(known) if len(known) == len(each) else None

    @property
    def tokens(self) -> int:
        """How many have come out in samples."""
        return sum(walk.tokens for walk in self._walks)

    def counts(self) -> dict[str, float]:
        """By ``tokens/NAME``, ``documents/NAME`` and ``epoch/NAME`` what has come out of each
        source so far; epochs are passes over all its tokens. And ``stream``, the digest of what
        has come out."""
        by_source = {
            f"{what}/{walk.source.name}": value
            for walk in self._walks
            for what, value in (
                ("tokens", float(walk.tokens)),
                ("documents", float(walk.documents)),
                ("epoch", walk.tokens / int(walk.source.length.sum())),
            )
        }
        return {"stream": shown(self.digest), **by_source}

    def take(self, count: int, *, only: slice = slice(None)) -> list[Sample]:
        """The next ``count`` samples of the stream, or ``only`` some of them.

        Raises:
            DataError: fewer are left, since every source ended. Nothing can be taken afterwards.
        """
        first = self.samples
        rows: list[list[int]] = []
        while len(rows) < count:
            if self._mixture.live:
                self._draw(rows, until=min(count, self._next_change - first))
            elif (row := self._bins.pop()) is not None:
                rows.append(row)
            else:
                raise DataError(self._explain_end(wanted=count, left=len(rows)))
            if first + len(rows) == self._next_change:
                self._follow_ratios(first + len(rows))
        self.samples += count
        self._count(rows, first=first)
        numbers = range(first, first + count)
        return [
            Sample(number=number, items=items)
            for number, items in zip(numbers[only], self._items(rows[only]), strict=True)
        ]

    def _draw(self, rows: list[list[int]], *, until: int) -> None:
        """Draw and pack up to ``until`` rows, or to the end of a source's window."""
        if self._stretch is None:
            self._stretch = self._mixture.merge([walk.cursor.left for walk in self._walks])
        stretch = self._stretch
        self._bins.fill(stretch.codes, rows=rows, until=until)
        counts, tokens = stretch.settle()
        self._mixture.add(tokens)
        for walk, count in zip(self._walks, counts, strict=True):
            walk.cursor.advance(count)
        if len(rows) >= until or not stretch.done:
            return
        self._stretch = None
        walk, sample = self._walks[stretch.dry], self.samples + len(rows)
        if walk.cursor.refill():
            return
        walk.ended = sample
        self.notes.append(self._describe_end(stretch.dry))
        self._mixture.change(self._ratios(sample))

    def _ratios(self, sample: int) -> list[float]:
        """Those in force before ``sample``; 0 for a source that has ended."""
        step = sample // self._samples_per_step
        return [
            0.0 if walk.ended is not None else ratio_at(walk.points, step, between=self._between)
            for walk in self._walks
        ]

    def _change_after(self, sample: int) -> int:
        """The next sample before which ratios change; beyond all samples if they do not."""
        step = sample // self._samples_per_step
        later = [at for walk in self._walks for at in walk.points if at > step]
        if not later:
            return 1 << 62
        step = step + 1 if self._between is Interpolation.linear else min(later)
        return step * self._samples_per_step

    def _follow_ratios(self, sample: int) -> None:
        self._mixture.change(self._ratios(sample))
        self._stretch = None
        self._next_change = self._change_after(sample)

    def _count(self, rows: Sequence[Sequence[int]], *, first: int) -> None:
        codes = np.fromiter(chain.from_iterable(rows), np.int64)
        found = stream_digest(codes, lengths=[len(row) for row in rows], first=first)
        self.digest = add_digests(self.digest, found)
        source, number = self._locate(codes)
        lengths = codes & LENGTH_MASK
        for place, walk in enumerate(self._walks):
            own = source == place
            walk.tokens += int(lengths[own].sum())
            walk.documents += walk.cursor.count_documents(number[own])

    def _items(self, rows: Sequence[Sequence[int]]) -> list[list[Item]]:
        """What codes stand for."""
        codes = np.fromiter(chain.from_iterable(rows), np.int64)
        source, number = self._locate(codes)
        pairs = zip(source.tolist(), number.tolist(), strict=True)
        items = list(map(_new_item, repeat(Item), pairs))
        ends = np.cumsum([len(row) for row in rows]).tolist()
        parts = [items[end - len(row) : end] for end, row in zip(ends, rows, strict=True)]
        if self.packed:
            for place, row in enumerate(rows):
                if row[0] & ROW:
                    ((origin, packed),) = parts[place]
                    parts[place] = [
                        Item(origin, item) for item in self.packed[origin].items(packed)
                    ]
        return parts

    def _locate(self, codes: Ints) -> tuple[Ints, Ints]:
        """The sources of codes, and the numbers of the items or rows there."""
        numbers = (codes & ~ROW) >> LENGTH_BITS
        source = np.searchsorted(self._first_item, numbers, side="right") - 1
        return source, numbers - self._first_item[source]

    def _describe_end(self, number: int) -> str:
        walk = self._walks[number]
        epoch, position, _ = walk.cursor.place()
        passes = epoch + position / walk.cursor.order.size
        return (
            f"source {walk.source.name!r} ended after {passes:.4g} epochs "
            f"({self._mixture.drawn[number]:,} tokens) before sample {walk.ended}"
        )

    def _explain_end(self, *, wanted: int, left: int) -> str:
        ends = [
            self._describe_end(number)
            if walk.ended is not None
            else f"source {walk.source.name!r} has the ratio 0 now"
            for number, walk in enumerate(self._walks)
        ]
        return (
            f"the data has ended: from sample {self.samples} on {wanted} are needed and {left} are "
            "left; " + "; ".join(ends) + ". In a new run, raise "
            "data.sources.NAME.epochs or max_tokens, add a source, or lower stage.steps; "
            "stage.init_from goes on from the weights of this one"
        )

    def state_dict(self) -> dict[str, Any]:
        """The cursor as JSON-able values; independent of ranks, workers and prefetching."""
        bins = self._bins.bins()
        held = self._items([bin.codes for bin in bins])
        return {
            "version": STATE_VERSION,
            **self._identity,
            "samples": self.samples,
            "stream": self.digest,
            "serial": self._bins.serial,
            "mixture": self._mixture.state_dict(),
            "sources": {walk.source.name: _saved(walk) for walk in self._walks},
            "bins": [
                [bin.free, bin.serial, [list(item) for item in items]]
                for bin, items in zip(bins, held, strict=True)
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` without replay.

        Raises:
            DataError: naming everything that differs from when the state was saved.
        """
        changes = changes_since(state, identity=self._identity, sources=self._sources)
        if changes:
            raise DataError(
                "the data position cannot be restored, because the data changed since it was "
                "saved: " + "; ".join(changes) + ". Restore the data and settings, or start a "
                "new run"
            )
        self.samples, self.digest = state["samples"], state["stream"]
        for walk, drawn in zip(self._walks, state["mixture"]["drawn"], strict=True):
            entry = state["sources"][walk.source.name]
            walk.tokens, walk.documents = entry["tokens"], entry["documents"]
            walk.ended = entry["ended"]
            walk.cursor.seek(
                epoch=entry["epoch"], position=entry["position"], piece=entry["piece"], drawn=drawn
            )
        self._stretch = None
        self._mixture.load_state_dict(state["mixture"], ratios=self._ratios(self.samples))
        self._next_change = self._change_after(self.samples)
        bins = [
            OpenBin(free=free, serial=serial, codes=[self._code(*item) for item in items])
            for free, serial, items in state["bins"]
        ]
        self._bins.restore(bins, serial=state["serial"])
        self.notes = []

    def _code(self, source: int, item: int) -> int:
        length = int(self._sources[source].length[item])
        return (int(self._first_item[source]) + item) << LENGTH_BITS | length


def _saved(walk: _Walk) -> dict[str, Any]:
    epoch, position, piece = walk.cursor.place()
    return {
        **walk.source.settings(),
        "items": len(walk.source.length),
        "fingerprint": walk.source.fingerprint,
        "left_out": list(walk.source.left_out),
        "epoch": epoch,
        "position": position,
        "piece": piece,
        "tokens": walk.tokens,
        "documents": walk.documents,
        "ended": walk.ended,
    }
