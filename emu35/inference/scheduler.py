"""Which requests are in flight, which slots of the cache they own, and what each of them feeds to
the next forward.

Requests are served first come, first served, as many at a time as ``max_requests`` and the cache
allow. A guided request has two streams, conditional and unconditional, which come and go as a pair.
Slots are taken as sequences grow rather than for the longest answer they might become; when they
run out, the youngest request gives its slots back and waits at the front of the line, to feed its
tokens again later (its random numbers depend on positions alone, so it goes on as if nothing had
happened).

A picture that is decoded in parallel is a canvas until it is done: fed again at every step, behind
the tokens before its IMG, while its streams stay where they are. The slots of the whole picture are
taken when its first step is prepared. What a canvas holds is no part of the cache and survives
being pushed out.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from emu35.inference.arena import Arena, Extent, whole_pages
from emu35.inference.canvas import Canvas
from emu35.inference.grammar import Grammar, Next, NextKind, State
from emu35.inference.request import Finish, Request, Token
from emu35.tokens.text import TextTokenizer

SHORT = 16
"""So many pending tokens are no prompt: an answer waits for them."""


@dataclass(kw_only=True, slots=True, eq=False)
class Stream:
    """A sequence of tokens as the model sees it. ``tokens`` are all of them, ``fed`` how many the
    cache holds, ``most`` how many there can ever be. ``row`` is where the engine keeps the newest
    hidden state. As many as ``at_once`` pending tokens are fed by one forward."""

    tokens: list[int]
    most: int
    fed: int = 0
    at_once: int = SHORT
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
    canvas: Canvas | None = None
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

    @property
    def wants_canvas(self) -> bool:
        """Whether a picture of known size begins here that is to be decoded in parallel."""
        grammar = self.grammar
        begins = grammar.state is State.ROW and (grammar.row, grammar.column) == (0, 0)
        return begins and self.request.denoise is not None and self.canvas is None

    @property
    def held_back(self) -> int:
        """Pending tokens that are not fed as such: a canvas begins with IMG."""
        return int(self.canvas is not None)

    @property
    def canvas_streams(self) -> list[Stream]:
        """Those that are fed the canvas in the step to come."""
        if self.canvas is None:
            return []
        return list(self.streams) if self.canvas.guides else [self.conditional]

    def commit(self, tokens: list[Token]) -> None:
        """Take the codes of the finished canvas. What they become is fed by one forward."""
        self.canvas = None
        for token in tokens:
            self.append(token)
            self.append_forced()
        for stream in self.streams:
            stream.at_once = max(SHORT, stream.pending)

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
    """``count`` tokens of ``stream`` for the next forward; or the ``canvas`` of its sequence, as
    many tokens from its IMG on."""

    stream: Stream
    count: int
    canvas: Canvas | None = None


@dataclass(kw_only=True, slots=True)
class Scheduler:
    """``chunk`` bounds the prompt tokens of one forward, and so its memory and the time that
    requests in the middle of an answer wait for it; ``canvas_chunk`` does so for the tokens of
    canvases, of which one goes ahead whatever its size. ``headroom`` is how many slots a request
    gets beyond its prompt where its images have no known size, and how many must be free for each
    stream in flight that may still grow so far, before another request is let in."""

    arena: Arena
    max_requests: int
    chunk: int
    headroom: int
    canvas_chunk: int
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
                pending = stream.pending - sequence.held_back
                short = pending <= stream.at_once
                count = pending if short else min(pending, prompts)
                if not (count or sequence.canvas) or sequence not in self.active:
                    continue
                canvas = sequence.canvas.slots if sequence.canvas else 0
                if not self._make_room(stream, count=(pending if canvas else count) + canvas):
                    self.preempt(sequence)
                    break
                prompts -= 0 if short else count
                if count:
                    feeds.append(Feed(stream=stream, count=count))
        feeds = [feed for feed in feeds if feed.stream.extent is not None]
        return [*feeds, *self._feed_canvases(feeds)]

    def _feed_canvases(self, feeds: list[Feed]) -> Iterator[Feed]:
        """The canvases whose streams hold all that is before them when ``feeds`` are taken, oldest
        first, as many as ``canvas_chunk`` permits."""
        counts = {id(feed.stream): feed.count for feed in feeds}
        # Prompts have a bound of their own; pictures that are done are fed whole.
        done = [feed.count for feed in feeds if SHORT < feed.count <= feed.stream.at_once]
        total = sum(done)
        first = True
        for sequence in self.active:
            canvas, streams = sequence.canvas, sequence.canvas_streams
            if canvas is None or any(
                s.pending - counts.get(id(s), 0) > 1 for s in sequence.streams
            ):
                continue
            total += canvas.length * len(streams)
            if total > self.canvas_chunk and not first:
                return
            first = False
            for stream in streams:
                yield Feed(stream=stream, count=canvas.length, canvas=canvas)

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
            stream.fed, stream.at_once = 0, SHORT
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
        if sequence.canvas is not None:
            ahead = max(ahead, sequence.canvas.slots)
        return [
            len(stream.tokens) + min(ahead, request.max_new_tokens - len(sequence.tokens))
            for stream in sequence.streams
        ]
