"""Which request owns which rows of the cache, and what each row feeds to the next forward.

Suffixes: R rows of the cache, S tokens of one forward.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from emu35.inference.grammar import Grammar, Next, NextKind
from emu35.inference.request import Finish, Request


@dataclass(kw_only=True, slots=True)
class Stream:
    """One row of the cache; ``pending`` are the tokens it has yet to feed."""

    row: int
    pending: list[int]


@dataclass(kw_only=True, slots=True)
class Sequence:
    """A request being generated: its streams, its place in the grammar and its randomness."""

    index: int
    request: Request
    grammar: Grammar
    generator: torch.Generator
    stop_ids: frozenset[int]
    conditional: Stream
    unconditional: Stream | None
    ids: list[int] = field(default_factory=list[int])
    finish: Finish | None = None

    @property
    def streams(self) -> Iterator[Stream]:
        """One stream, or two with guidance."""
        yield self.conditional
        if self.unconditional is not None:
            yield self.unconditional

    @property
    def ready(self) -> bool:
        """Whether the model has seen everything the next token depends on."""
        return not any(stream.pending for stream in self.streams)

    def append(self, token: int) -> None:
        """Take a legal token, and feed it to whichever streams see it."""
        self.ids.append(token)
        in_image = self.grammar.accept(token)
        self.conditional.pending.append(token)
        if in_image and self.unconditional is not None:
            self.unconditional.pending.append(token)
        if token in self.stop_ids:
            self.finish = Finish.eos if token == self.grammar.vocabulary.eos else Finish.image
        elif len(self.ids) >= self.request.max_new_tokens:
            self.finish = Finish.length

    def append_forced(self) -> Next:
        """Take every token that leaves no choice; what the first free one is chosen from."""
        while (step := self.grammar.next()).kind is NextKind.FORCED and self.finish is None:
            self.append(step.ids[0])
        return step


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """Input of one forward: right-padded tokens int64 [R, S] and how many count, int64 [R]."""

    tokens_RS: np.ndarray
    counts_R: np.ndarray


@dataclass(kw_only=True, slots=True)
class Scheduler:
    """First come, first served over ``rows`` cache rows. At most ``chunk`` tokens of a row are
    fed at once, which bounds the memory of long prompts."""

    rows: int
    chunk: int
    waiting: deque[Sequence] = field(default_factory=deque[Sequence])
    active: list[Sequence] = field(default_factory=list[Sequence])
    _free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.restore(self.rows)

    def restore(self, rows: int) -> None:
        """Start over with ``rows`` free rows; nothing may be active."""
        assert not self.active
        self.rows, self._free = rows, list(reversed(range(rows)))

    def admit(self) -> list[int]:
        """Give free rows to waiting requests, in order; the rows that changed hands."""
        taken: list[int] = []
        while self.waiting and len(self._free) >= len(list(self.waiting[0].streams)):
            sequence = self.waiting.popleft()
            for stream in sequence.streams:
                stream.row = self._free.pop()
                taken.append(stream.row)
            self.active.append(sequence)
        return taken

    def retire(self) -> list[Sequence]:
        """Remove the finished sequences and free their rows."""
        finished = [sequence for sequence in self.active if sequence.finish is not None]
        if finished:
            self.active = [sequence for sequence in self.active if sequence.finish is None]
            self._free += [stream.row for sequence in finished for stream in sequence.streams]
        return finished

    def feed(self) -> Feed:
        """The next tokens of every row; rows without any count zero."""
        streams = [s for sequence in self.active for s in sequence.streams if s.pending]
        width = min(max(len(stream.pending) for stream in streams), self.chunk)
        tokens_RS = np.zeros((self.rows, width), dtype=np.int64)
        counts_R = np.zeros(self.rows, dtype=np.int64)
        for stream in streams:
            now = stream.pending[:width]
            tokens_RS[stream.row, : len(now)] = now
            counts_R[stream.row] = len(now)
            del stream.pending[:width]
        return Feed(tokens_RS=tokens_RS, counts_R=counts_R)

    def compact(self) -> list[int] | None:
        """Shrink to the rows in use once nothing waits and at least half of them lie idle; they
        come back when the last sequence has ended (``restore``).

        Returns:
            the old number of every row that stays, in the new order, or None for no change.
        """
        streams = [stream for sequence in self.active for stream in sequence.streams]
        if self.waiting or not streams or 2 * len(streams) > self.rows:
            return None
        kept = [stream.row for stream in streams]
        for row, stream in enumerate(streams):
            stream.row = row
        self.rows, self._free = len(streams), []
        return kept
