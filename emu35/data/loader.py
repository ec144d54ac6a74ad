"""What training asks for batches: the token loader, and a validation set read whole."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from emu35.config.data import (
    CacheConfig,
    Damaged,
    FilterConfig,
    Overlong,
    Packing,
    SourceConfig,
    TokenDataConfig,
    ValidationConfig,
    is_drawn,
)
from emu35.data.batch import Batch, BatchChange, SourceItems, as_it_is, assemble
from emu35.data.filter import apply_filter, describe_filter
from emu35.data.pack import Item, best_fit_decreasing
from emu35.data.packed_items import PackedItems
from emu35.data.place import Place, Url, name_of, place_of
from emu35.data.plan import PlannedSource, Planner, Sample
from emu35.data.prefetch import Prefetcher
from emu35.data.row_settings import CONFIG, RowSettings
from emu35.data.source import Items, Source, check_vision, say_nothing
from emu35.data.storage import Message as Message
from emu35.errors import DataError
from emu35.tokens.vocabulary import Vocabulary

_ENOUGH = 0.9
"""Of the tokens that the rows of a run have places for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """This rank's share of a global step; of the whole step, what is counted, what there is to say
    of it, and the planner's state after it."""

    batches: list[Batch]
    counts: dict[str, float]
    notes: list[str]
    state: dict[str, Any]


class TokenLoader:
    """Micro-batches of this rank, step after step, from a stream all ranks agree on.

    Of every ``global_batch_size`` consecutive samples, rank r of n takes the r-th n-th, so that
    the ranks' slices laid end to end are the stream, whatever n is. Batches are prepared
    ``data.prefetch_steps`` ahead in a thread, ``prepare`` included; the state is that of the steps
    handed out. ``message`` hears once what filters, ``data.overlong`` and ``data.damaged`` leave
    out, how full offline packing gets, and when a source has ended; ``alarm`` (``message`` without
    it) of every document that turns out damaged when it is read, which this rank alone notices.
    """

    def __init__(
        self,
        *,
        data: TokenDataConfig,
        vocabulary: Vocabulary,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        message: Message = say_nothing,
        prepare: BatchChange = as_it_is,
        reads: bool = True,
        steps: int | None = None,
        alarm: Message | None = None,
    ) -> None:
        """Open every source whose ratio is ever positive. A loader that does not read plans along
        and hands out no batches: its rank gets them from another.

        Raises:
            DataError: if a source is missing, damaged, empty, was made with another tokenizer, or
                holds documents longer than ``data.sequence_length`` that ``data.overlong`` refuses
                or cannot cut; or if all have an end and too few tokens for ``steps``.
        """
        share = global_batch_size // dp_size
        if global_batch_size % dp_size or share % micro_batch_size:
            raise DataError(
                f"a global batch of {global_batch_size} samples does not divide into {dp_size} "
                f"ranks x micro-batches of {micro_batch_size}; "
                f"use a multiple of {dp_size * micro_batch_size}"
            )
        if not any(is_drawn(source) for source in data.sources.values()):
            raise DataError(
                "data.sources names no source with a positive ratio; add one, for example "
                "data.sources.text.path=FOLDER"
            )
        self._data, self._prepare = data, prepare
        self._pad = vocabulary.pad
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        first = dp_rank * share
        self._mine = slice(first, first + share if reads else first)
        self._sources: list[SourceItems] = []
        planned: list[PlannedSource] = []
        for name, config in sorted(data.sources.items()):
            if is_drawn(config):
                entry = open_source(
                    name=name,
                    path=place_of(config.path),
                    vocabulary=vocabulary,
                    limit=data.sequence_length,
                    bounds=config.filter,
                    overlong=data.overlong,
                    damaged=data.damaged,
                    cache=data.cache,
                    message=message,
                    alarm=alarm,
                )
                self._sources.append(entry)
                if entry.items.rows is None:
                    packing = config.packing or data.packing
                    _warn_of_thrashing(entry.source, packing=packing, data=data, message=message)
                elif config.packing is Packing.online:
                    raise DataError(
                        f"data.sources.{name}.packing=online, but {config.path} lies packed, and "
                        "its rows are read as they are; leave packing out, or name the folders "
                        "that it was packed from"
                    )
                planned.append(_plan(entry, config=config, data=data))
        check_vision(self.sources)
        self._planner = Planner(
            sources=planned,
            sequence_length=data.sequence_length,
            open_bins=data.open_bins,
            shuffle_window=data.shuffle_window,
            seed=seed,
            overlong=data.overlong,
            between=data.schedule,
            samples_per_step=global_batch_size,
        )
        self._message = message
        for number, rows in self._planner.packed.items():
            entry = self._sources[number]
            packed = "packed offline into" if entry.items.rows is None else "that lie packed in"
            message(
                f"source {entry.source.name!r}: {len(entry.items)} pieces {packed} "
                f"{len(rows)} rows of {data.sequence_length} tokens, {rows.fill:.2%} full"
            )
        if steps is not None:
            self._check_supply(steps)
        self._counts: dict[str, float] = {}
        self._state = self._planner.state_dict()
        self._prefetcher = self._new_prefetcher()

    def _check_supply(self, steps: int) -> None:
        """Sources that all end should not do so before the run does."""
        available = self._planner.available
        wanted = steps * self._global_batch_size * self._data.sequence_length
        if available is None or available >= wanted:
            return
        text = (
            f"every source has an end (data.sources.NAME.epochs or max_tokens), and together they "
            f"hold about {available:,} tokens, but {steps} steps of {self._global_batch_size} "
            f"samples of {self._data.sequence_length} tokens take up to {wanted:,}"
        )
        if available < _ENOUGH * wanted:
            raise DataError(
                f"{text}. Raise epochs or max_tokens of a source or leave them out, add a source, "
                f"or set stage.steps to at most {int(steps * available / wanted)}"
            )
        self._message(f"{text}; the run may stop before its last step")

    def __enter__(self) -> "TokenLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def sources(self) -> list[Source]:
        """Those whose ratio is ever positive, by name."""
        return [entry.source for entry in self._sources]

    @property
    def damaged_documents(self) -> int:
        """How many documents this rank has found damaged so far, and put padding in their place."""
        return sum(len(source.damaged_documents) for source in self.sources)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global step.

        Raises:
            DataError: if a shard changed under the run and ``data.damaged`` refuses it, or cannot
                be reached any more; or if all sources have ended.
        """
        step = self._prefetcher.next()
        self._state, self._counts = step.state, step.counts
        for note in step.notes:
            self._message(note)
        return step.batches

    def counts(self) -> dict[str, float]:
        """Of the last step handed out, the same on every rank: ``tokens/NAME``,
        ``documents/NAME`` and ``epoch/NAME`` (passes, with fractions) by source since the run
        began, and ``fill``, the share of the step's rows that holds tokens."""
        return self._counts

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last step handed out; the same on every rank."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with any data-parallel size.

        Raises:
            DataError: naming what changed in the data or its settings.
        """
        self._prefetcher.close()
        self._planner.load_state_dict(state)
        self._state = self._planner.state_dict()
        self._prefetcher = self._new_prefetcher()

    def close(self) -> None:
        """End the prefetching thread."""
        self._prefetcher.close()

    def _new_prefetcher(self) -> Prefetcher[_Step]:
        return Prefetcher(self._produce, depth=self._data.prefetch_steps, name="emu35-loader")

    def _produce(self) -> _Step:
        planner = self._planner
        before = planner.tokens
        samples = planner.take(self._global_batch_size, only=self._mine)
        places = self._global_batch_size * self._data.sequence_length
        counts = {**planner.counts(), "fill": (planner.tokens - before) / places}
        notes, planner.notes = planner.notes, []
        state = planner.state_dict()
        size = self._micro_batch_size
        batches = [
            self._prepare(
                assemble(
                    samples[first : first + size],
                    sources=self._sources,
                    sequence_length=self._data.sequence_length,
                    pad=self._pad,
                )
            )
            for first in range(0, len(samples), size)
        ]
        return _Step(batches=batches, counts=counts, notes=notes, state=state)


class ValidationSet:
    """The first ``max_documents`` documents of a folder, packed densely, in a fixed order; of a
    folder that lies packed the first ``max_documents`` pieces, in the rows that hold them.

    Every rank iterates the same number of batches: rows beyond the last sample are padding, with
    no valid label. Which modality the loss is about is for the caller to weigh.
    """

    def __init__(
        self,
        *,
        config: ValidationConfig,
        data: TokenDataConfig,
        vocabulary: Vocabulary,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        message: Message = say_nothing,
        prepare: BatchChange = as_it_is,
    ) -> None:
        """Raises: DataError, as :class:`TokenLoader` does."""
        self._entry = open_source(
            name=name_of(place_of(config.path)),
            path=place_of(config.path),
            vocabulary=vocabulary,
            limit=data.sequence_length,
            max_documents=config.max_documents,
            overlong=data.overlong,
            damaged=data.damaged,
            cache=data.cache,
            message=message,
        )
        self._length, self._prepare = data.sequence_length, prepare
        self._pad = vocabulary.pad
        self._size = micro_batch_size
        stored = self._entry.items.rows
        if stored is not None:
            bins = [stored.items(row) for row in range(len(stored))]
        else:
            bins = best_fit_decreasing(
                lengths=self._entry.items.length.tolist(), capacity=data.sequence_length
            )
        samples = [
            Sample(number=number, items=[Item(0, item) for item in items])
            for number, items in enumerate(bins)
        ]
        self._batches = -(-len(samples) // (micro_batch_size * dp_size))
        rows: list[Sample | None] = [*samples]
        rows += [None] * (self._batches * micro_batch_size * dp_size - len(samples))
        self._rows = rows[dp_rank::dp_size]

    @property
    def source(self) -> Source:
        """The folder that the documents are from."""
        return self._entry.source

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self._rows), self._size):
            yield self._prepare(
                assemble(
                    self._rows[first : first + self._size],
                    sources=[self._entry],
                    sequence_length=self._length,
                    pad=self._pad,
                )
            )


def open_source(
    *,
    name: str,
    path: Place,
    vocabulary: Vocabulary,
    limit: int,
    max_documents: int | None = None,
    bounds: FilterConfig | None = None,
    overlong: Overlong = Overlong.cut,
    damaged: Damaged = Damaged.refuse,
    cache: CacheConfig | None = None,
    message: Message = say_nothing,
    alarm: Message | None = None,
    settings: RowSettings = CONFIG,
) -> SourceItems:
    """Open a folder of shards and fit its documents to rows of ``limit`` tokens.

    ``bounds`` are those that its documents are to keep. ``message`` hears what they, ``overlong``
    and ``damaged`` leave out; for ``alarm`` see :class:`~emu35.data.source.Source`. All call
    things as ``settings`` do.

    Raises:
        DataError: if the folder cannot be used, is empty, nothing of it is left, or it lies packed
            and its rows have another length or are to be filtered.
    """
    source = Source(
        name=name,
        path=path,
        vocabulary=vocabulary,
        damaged=damaged,
        cache=cache,
        message=message,
        alarm=alarm,
    )
    if source.packed is not None:
        if describe_filter(bounds) != describe_filter(None):
            raise DataError(
                f"data.sources.{name}.filter chooses among documents, but {path} lies packed in "
                "rows; filter the folders that it was packed from, or leave the filter out"
            )
        items = PackedItems(source=source, limit=limit, max_pieces=max_documents, overlong=overlong)
        return _checked(items, source=source, limit=limit, message=message, settings=settings)
    keep = None
    if max_documents is not None:
        keep = np.arange(len(source)) < max_documents
    if bounds is not None:
        filtered = apply_filter(source, bounds=bounds)
        if filtered.left_out is not None:
            if not filtered.keep.any():
                raise DataError(f"{filtered.left_out}. That leaves nothing; widen its filter")
            message(filtered.left_out)
        keep = filtered.keep if keep is None else keep & filtered.keep
    items = Items(source=source, limit=limit, documents=keep, overlong=overlong, settings=settings)
    return _checked(items, source=source, limit=limit, message=message, settings=settings)


def _checked(
    items: Items, *, source: Source, limit: int, message: Message, settings: RowSettings
) -> SourceItems:
    """Tell what was dropped. Raises: DataError if nothing is left."""
    drop = settings.overlong_is(Overlong.drop)
    if items.dropped is not None:
        too_long = items.dropped.describe(source=source, limit=limit)
        if len(items) == 0:
            raise DataError(
                f"{too_long}. {drop} leaves nothing of this source; raise {settings.length}, or "
                "ingest pictures with a smaller area"
            )
        message(f"{too_long}. They are left out ({drop})")
    if len(items) == 0:
        raise DataError(f"shard folder {source.path} holds no document; ingest some into it")
    return SourceItems(source=source, items=items)


def _warn_of_thrashing(
    source: Source, *, packing: Packing, data: TokenDataConfig, message: Message
) -> None:
    size = sum(shard.tar_bytes for shard in source.shards)
    if isinstance(source.path, Url) and packing is Packing.offline and size > data.cache.bytes:
        message(
            f"source {source.name!r} ({source.path}) is packed offline, so that every row has "
            f"documents from all over it, and its {size} bytes do not fit "
            f"data.cache.bytes={data.cache.bytes}: shards will come again and again. Raise the "
            "bound, or pack it online"
        )


def plan_source(
    entry: SourceItems, *, ratio: float, packing: Packing = Packing.online
) -> PlannedSource:
    """What the planner needs to know of a source."""
    rows, document = entry.items.rows, entry.items.document
    if isinstance(entry.items, PackedItems):
        # Where the next document begins; the rest of one that was cut may lie anywhere.
        document = np.cumsum(entry.items.is_beginning) - 1
    return PlannedSource(
        name=entry.source.name,
        ratio=ratio,
        length=entry.items.length,
        per_shard=entry.items.per_shard,
        fingerprint=entry.source.fingerprint,
        left_out=tuple(shard.name for shard in entry.source.damaged),
        packing=packing if rows is None else Packing.offline,
        document=document,
        rows=rows,
    )


def _plan(entry: SourceItems, *, config: SourceConfig, data: TokenDataConfig) -> PlannedSource:
    """With all that the configuration says of it."""
    return replace(
        plan_source(entry, ratio=config.ratio, packing=config.packing or data.packing),
        schedule=dict(config.schedule),
        epochs=config.epochs,
        max_tokens=config.max_tokens,
        filter=describe_filter(config.filter),
    )
