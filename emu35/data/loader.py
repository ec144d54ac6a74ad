"""What training asks for batches: the token loader, and a validation set read whole."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from emu35.config.data import TokenDataConfig, ValidationConfig
from emu35.data.batch import Batch, BatchChange, as_it_is, assemble
from emu35.data.opening import open_plan, open_source
from emu35.data.pack import Item, best_fit_decreasing
from emu35.data.place import name_of, place_of
from emu35.data.plan import Sample
from emu35.data.prefetch import Prefetcher
from emu35.data.source import Source, say_nothing
from emu35.data.storage import Message as Message
from emu35.errors import DataError
from emu35.tokens.vocabulary import Vocabulary

LOADER_FILE = "loader.json"
"""Where a checkpoint keeps :meth:`TokenLoader.state_dict`."""

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
        self._data, self._prepare = data, prepare
        self._pad = vocabulary.pad
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        first = dp_rank * share
        self._mine = slice(first, first + share if reads else first)
        plan = open_plan(
            data=data,
            vocabulary=vocabulary,
            seed=seed,
            global_batch_size=global_batch_size,
            message=message,
            alarm=alarm,
        )
        self._sources, self._planner, self._message = plan.sources, plan.planner, message
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
