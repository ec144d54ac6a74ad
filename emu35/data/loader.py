"""What training asks for batches: the endless token loader, and a validation set read whole."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emu35.config.data import Overlong, Packing, TokenDataConfig, ValidationConfig
from emu35.data.batch import Batch, BatchChange, SourceItems, as_it_is, assemble
from emu35.data.pack import Item, best_fit_decreasing
from emu35.data.plan import PlannedSource, Planner, Sample
from emu35.data.prefetch import Prefetcher
from emu35.data.source import Items, Source, check_vision
from emu35.errors import DataError
from emu35.tokens.vocabulary import Vocabulary

Message = Callable[[str], None]
"""Tells the person who started the run something."""

LOADER_FILE = "loader.json"
"""Where a checkpoint keeps :meth:`TokenLoader.state_dict`."""


def _say_nothing(text: str) -> None:
    del text


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """This rank's share of a global step, and the planner's state after the whole step."""

    batches: list[Batch]
    state: dict[str, Any]


class TokenLoader:
    """Micro-batches of this rank, step after step, from a stream all ranks agree on.

    Of every ``global_batch_size`` consecutive samples, rank r of n takes the r-th n-th, so that
    the ranks' slices laid end to end are the stream, whatever n is. Batches are prepared
    ``data.prefetch_steps`` ahead in a thread, ``prepare`` included; the state is that of the steps
    handed out. ``message`` hears once what ``data.overlong`` leaves out and how full offline
    packing gets.
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
        message: Message = _say_nothing,
        prepare: BatchChange = as_it_is,
    ) -> None:
        """Open every source with a positive ratio.

        Raises:
            DataError: if a source is missing, damaged, empty, was made with another tokenizer, or
                holds documents longer than ``data.sequence_length`` that ``data.overlong`` refuses
                or cannot cut.
        """
        share = global_batch_size // dp_size
        if global_batch_size % dp_size or share % micro_batch_size:
            raise DataError(
                f"a global batch of {global_batch_size} samples does not divide into {dp_size} "
                f"ranks x micro-batches of {micro_batch_size}; "
                f"use a multiple of {dp_size * micro_batch_size}"
            )
        self._data, self._prepare = data, prepare
        self._pad = vocabulary.pad
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._mine = slice(dp_rank * share, (dp_rank + 1) * share)
        plan = open_plan(data=data, vocabulary=vocabulary, seed=seed, message=message)
        self._sources, self._planner = plan.sources, plan.planner
        self._state = self._planner.state_dict()
        self._prefetcher = self._new_prefetcher()

    def __enter__(self) -> "TokenLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def sources(self) -> list[Source]:
        """Those with a positive ratio, by name."""
        return [entry.source for entry in self._sources]

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global step.

        Raises:
            DataError: if a shard changed under the run.
        """
        step = self._prefetcher.next()
        self._state = step.state
        return step.batches

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
        samples = self._planner.take(self._global_batch_size)[self._mine]
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
        return _Step(batches=batches, state=self._planner.state_dict())


class ValidationSet:
    """The first ``max_documents`` documents of a folder, packed densely, in a fixed order.

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
        message: Message = _say_nothing,
        prepare: BatchChange = as_it_is,
    ) -> None:
        """Raises: DataError, as :class:`TokenLoader` does."""
        self._entry = open_source(
            name=Path(config.path).name,
            path=Path(config.path),
            vocabulary=vocabulary,
            limit=data.sequence_length,
            max_documents=config.max_documents,
            overlong=data.overlong,
            message=message,
        )
        self._length, self._prepare = data.sequence_length, prepare
        self._pad = vocabulary.pad
        self._size = micro_batch_size
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


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenPlan:
    """The sources of a mixture, by name, and the planner that numbers them in this order."""

    sources: list[SourceItems]
    planner: Planner


def open_plan(
    *,
    data: TokenDataConfig,
    vocabulary: Vocabulary,
    seed: int,
    message: Message = _say_nothing,
) -> OpenPlan:
    """Open every source with a positive ratio and plan from the first sample on: the stream that
    all ranks of a run agree on, whatever their number.

    Raises:
        DataError: as :class:`TokenLoader` does.
    """
    if not any(source.ratio > 0 for source in data.sources.values()):
        raise DataError(
            "data.sources names no source with a positive ratio; add one, for example "
            "data.sources.text.path=FOLDER"
        )
    sources: list[SourceItems] = []
    planned: list[PlannedSource] = []
    for name, config in sorted(data.sources.items()):
        if config.ratio > 0:
            entry = open_source(
                name=name,
                path=Path(config.path),
                vocabulary=vocabulary,
                limit=data.sequence_length,
                overlong=data.overlong,
                message=message,
            )
            sources.append(entry)
            packing = config.packing or data.packing
            planned.append(plan_source(entry, ratio=config.ratio, packing=packing))
    check_vision([entry.source for entry in sources])
    planner = Planner(
        sources=planned,
        sequence_length=data.sequence_length,
        open_bins=data.open_bins,
        shuffle_window=data.shuffle_window,
        seed=seed,
        overlong=data.overlong,
    )
    for number, rows in planner.packed.items():
        entry = sources[number]
        message(
            f"source {entry.source.name!r}: {len(entry.items)} pieces packed offline into "
            f"{len(rows)} rows of {data.sequence_length} tokens, {rows.fill:.2%} full"
        )
    return OpenPlan(sources=sources, planner=planner)


def open_source(
    *,
    name: str,
    path: Path,
    vocabulary: Vocabulary,
    limit: int,
    max_documents: int | None = None,
    overlong: Overlong = Overlong.cut,
    message: Message = _say_nothing,
) -> SourceItems:
    """Open a folder of shards and fit its documents to rows of ``limit`` tokens.

    ``message`` hears what ``overlong`` leaves out.

    Raises:
        DataError: if the folder cannot be used, is empty, or nothing of it is left.
    """
    source = Source(name=name, path=path, vocabulary=vocabulary)
    keep = None
    if max_documents is not None:
        keep = np.arange(len(source)) < max_documents
    items = Items(source=source, limit=limit, documents=keep, overlong=overlong)
    if items.dropped is not None:
        too_long = items.dropped.describe(source=source, limit=limit)
        if len(items) == 0:
            raise DataError(
                f"{too_long}. data.overlong=drop leaves nothing of this source; raise "
                "data.sequence_length, or ingest pictures with a smaller area"
            )
        message(f"{too_long}. They are left out (data.overlong=drop)")
    if len(items) == 0:
        raise DataError(f"shard folder {path} holds no document; ingest some into it")
    return SourceItems(source=source, items=items)


def plan_source(
    entry: SourceItems, *, ratio: float, packing: Packing = Packing.online
) -> PlannedSource:
    """What the planner needs to know of a source."""
    return PlannedSource(
        name=entry.source.name,
        ratio=ratio,
        length=entry.items.length,
        per_shard=entry.items.per_shard,
        fingerprint=entry.source.fingerprint,
        packing=packing,
    )
