"""Which requests are in flight, which slots of the cache they own, and what each of them feeds to
the next forward.

Requests are served first come, first served, as many at a time as ``max_requests`` and the cache
allow. A guided request has two streams, conditional and unconditional, which come and go as a pair.
Slots are taken as sequences grow rather than for the longest answer they might become; when they
run out, the youngest request gives its slots back and waits at the front of the line, to feed its
tokens again later (its random numbers depend on positions alone, so it goes on as if nothing had
happened).
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from emu35.inference.arena import Arena, Extent, whole_pages
from emu35.inference.grammar import Grammar, Next, NextKind
from emu35.inference.request import Finish, Request, Token
from emu35.tokens.text import TextTokenizer


@dataclass(kw_only=True, slots=True, eq=False)
class Stream:
    """A sequence of tokens as the model sees it. ``tokens`` are all of them, ``fed`` how many the
    cache holds, ``most`` how many there can ever be. ``row`` is where the engine keeps the newest
    hidden state."""

    tokens: list[int]
    most: int
    fed: int = 0
    extent: Extent | None = None
    row: int = -1

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen."""
        return len(self.tokens) - self.fed


@dataclass(kw_only=True, slots=True, eq=False)
class Sequence:
    """A request being generated: its streams and its place in the grammar."""

    index: int
    request: Request
    grammar: Grammar
    tokenizer: TextTokenizer
    conditional: Stream
    unconditional: Stream | None
    tokens: list[Token] = field(default_factory=list[Token])
    reported: int = 0
    finish: Finish | None = None
    _text: list[int] = field(default_factory=list[int])  # the present stretch of text

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

    def next(self) -> Next:
        """The legal next tokens."""
        return self.grammar.next(room=self.request.max_new_tokens - len(self.tokens))

    def append(self, token: Token) -> None:
        """Take a legal token, and feed it to whichever streams see it."""
        self.tokens.append(token)
        seen_by_both = self.grammar.accept(token.id)
        self.conditional.tokens.append(token.id)
        if seen_by_both and self.unconditional is not None:
            self.unconditional.tokens.append(token.id)
        vocabulary, request = self.grammar.vocabulary, self.request
        if token.id == vocabulary.eos:
            self.finish = Finish.eos
        elif request.max_images and self.grammar.images >= request.max_images:
            self.finish = Finish.images
        elif self._stopped_by(token):
            self.finish = Finish.stop
        elif len(self.tokens) >= request.max_new_tokens:
            self.finish = Finish.length

    def append_forced(self) -> None:
        """Take every token that leaves no choice: it costs no projection and no draw, and is fed
        together with the token before it."""
        while self.finish is None:
            step = self.next()
            if step.kind is not NextKind.FORCED:
                return
            self.append(Token(id=step.ids[0], kind=NextKind.FORCED))

    def _stopped_by(self, token: Token) -> bool:
        if not self.request.stop:
            return False
        # The digits of an image's size are no text, though they have the same ids.
        if token.kind is not NextKind.TEXT or token.id >= self.grammar.vocabulary.n_text:
            self._text.clear()
            return False
        self._text.append(token.id)
        # A token has at least one byte, so a stop string that ends with this one began in here.
        longest = max(len(string.encode()) for string in self.request.stop)
        tail = self.tokenizer.decode(self._text[-longest:])
        return any(string in tail for string in self.request.stop)


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """``count`` tokens of ``stream`` for the next forward."""

    stream: Stream
    count: int


@dataclass(kw_only=True, slots=True)
class Scheduler:
    """``chunk`` bounds the prompt tokens of one forward, and so its memory and the time that
    requests in the middle of an answer wait for it. ``headroom`` is how many slots a request gets
    beyond its prompt where its images have no known size, and how many must be free for each
    stream in flight that may still grow so far, before another request is let in."""

    arena: Arena
    max_requests: int
    chunk: int
    headroom: int
    waiting: deque[Sequence] = field(default_factory=deque[Sequence])
    active: list[Sequence] = field(default_factory=list[Sequence])
    preemptions: int = 0
    _rows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._rows = list(range(2 * self.max_requests))[::-1]

    def admit(self) -> None:
        """Let waiting requests in, in order, while there is room for the first of them."""
        while self.waiting and len(self.active) < self.max_requests:
            sequence = self.waiting[0]
            needs = [whole_pages(slots) for slots in self._first_slots(sequence)]
            # What runs already must be able to go on for a while.
            if self.active and sum(needs) + self._reserve() > self.arena.free:
                return
            self.waiting.popleft()
            for stream, need in zip(sequence.streams, needs, strict=True):
                stream.extent, stream.row = self.arena.allocate(need), self._rows.pop()
                assert stream.extent is not None, "submit refuses what cannot fit"
            self.active.append(sequence)

    def feed(self) -> list[Feed]:
        """What the next forward takes: everything that answers wait for, and as much of the
        prompts as ``chunk`` permits. Streams that find no slots push the youngest request out."""
        feeds: list[Feed] = []
        prompts = self.chunk
        for sequence in list(self.active):
            for stream in sequence.streams:
                short = stream.pending <= 16
                count = stream.pending if short else min(stream.pending, prompts)
                if not count or sequence not in self.active:
                    continue
                if not self._make_room(stream, count=count):
                    self.preempt(sequence)
                    break
                prompts -= 0 if short else count
                feeds.append(Feed(stream=stream, count=count))
        return [feed for feed in feeds if feed.stream.extent is not None]

    def retire(self) -> list[Sequence]:
        """Remove the finished sequences and free what they held."""
        finished = [sequence for sequence in self.active if sequence.finish is not None]
        for sequence in finished:
            self._release(sequence)
        return finished

    def remove(self, index: int) -> Sequence | None:
        """Take request ``index`` out, wherever it stands; None if it is not here."""
        for sequence in self.active:
            if sequence.index == index:
                self._release(sequence)
                return sequence
        for sequence in self.waiting:
            if sequence.index == index:
                self.waiting.remove(sequence)
                return sequence
        return None

    def preempt(self, sequence: Sequence) -> None:
        """Put ``sequence`` back to the front of the line; it feeds its tokens again later."""
        self._release(sequence)
        for stream in sequence.streams:
            stream.fed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _reserve(self) -> int:
        """Slots to be left for the streams in flight, as far as they can grow at all."""
        return sum(
            min(self.headroom, whole_pages(stream.most) - stream.extent.size)
            for sequence in self.active
            for stream in sequence.streams
            if stream.extent is not None
        )

    def _make_room(self, stream: Stream, *, count: int) -> bool:
        """Slots for ``count`` more tokens, at the cost of younger requests if need be."""
        extent = stream.extent
        assert extent is not None
        while not self.arena.grow(extent, stream.fed + count, most=stream.most):
            youngest = self.active[-1]
            if stream in youngest.streams:
                return False
            self.preempt(youngest)
        return True

    def _release(self, sequence: Sequence) -> None:
        self.active.remove(sequence)
        for stream in sequence.streams:
            assert stream.extent is not None
            self.arena.release(stream.extent)
            self._rows.append(stream.row)
            stream.extent, stream.row = None, -1

    def _first_slots(self, sequence: Sequence) -> list[int]:
        """Slots that each stream asks for when it is let in."""
        request = sequence.request
        size = request.grammar.size
        ahead = size.image_tokens * max(1, request.max_images) if size else self.headroom
        return [
            len(stream.tokens) + min(ahead, request.max_new_tokens - len(sequence.tokens))
            for stream in sequence.streams
        ]
