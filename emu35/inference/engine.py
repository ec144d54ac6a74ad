"""The engine: many requests through one cache, a step at a time.

Suffixes: R rows (streams in flight), S tokens of one forward, N sequences chosen together, H hidden
size.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch

from emu35.checkpoint.buckets import Bucket, Receiver
from emu35.checkpoint.gathered import receiver_of
from emu35.errors import ConfigError, QueueFull
from emu35.inference.arena import Arena, whole_pages
from emu35.inference.choose import Chooser
from emu35.inference.denoise import Denoiser, Denoising
from emu35.inference.grammar import Grammar, SizeIds
from emu35.inference.memory import allocate, request_slots
from emu35.inference.ranks import agree_on
from emu35.inference.request import Finish, Generated, Request, Update
from emu35.inference.row import TokenRow
from emu35.inference.scheduler import Feed, Scheduler, Sequence, Stream
from emu35.model.transformer import Emu35Model
from emu35.parallel.cpu import without_shim
from emu35.tokens.serialize import deserialize
from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """How full the engine is, and what it has done since it was made. ``cache_used`` and
    ``cache_tokens`` count slots; ``forced`` tokens are among ``tokens_generated``; ``projected_*``
    count hidden rows that choose one token, by the part of the vocabulary that they are projected
    on; those of canvases are not among them. ``denoise_steps`` counts the steps of all canvases,
    of which one forward may take many, ``images_denoised`` the pictures that came of them."""

    waiting: int
    active: int
    cache_used: int
    cache_tokens: int
    forwards: int
    tokens_fed: int
    tokens_generated: int
    forced: int
    preemptions: int
    projected_visual: int
    projected_text: int
    projected_digits: int
    denoise_steps: int
    images_denoised: int


class Engine:
    """Continuous batching over a preallocated cache.

    Under tensor parallelism every rank of the group builds its own engine around its part of the
    model and is told the same things in the same order; the first rank draws for all of them.

    Args:
        model: put into evaluation mode by every step.
        max_length: tokens of the longest stream, prompt and answer; at most the model's positions.
        cache_tokens: slots of the cache over all streams (a guided request has two streams);
            enough for ``max_requests`` of the longest by default.
        max_requests: requests in flight at once.
        max_waiting: requests in line beyond those; None for any number.
        prefill_chunk: prompt tokens fed by one forward at most.
        canvas_chunk: tokens of canvases fed by one forward at most, those of pictures that are done
            and fed once more among them; bounds the memory of a step while pictures are decoded in
            parallel. One canvas goes ahead whatever its size, and all that are done go together.
        denoiser: lets requests decode pictures in parallel (``Request.denoise``).
        headroom: slots kept free for each growing stream when another request is let in. Fewer
            fill the cache better, more make it rarer that a request is pushed out and starts over.

    Raises:
        ConfigError: the model is split in a way that cannot generate, or a number is too small.
    """

    def __init__(
        self,
        *,
        model: Emu35Model,
        tokenizer: TextTokenizer,
        max_length: int,
        cache_tokens: int | None = None,
        max_requests: int = 16,
        max_waiting: int | None = None,
        prefill_chunk: int = 256,
        headroom: int = 256,
        canvas_chunk: int = 32768,
        denoiser: Denoiser | None = None,
    ) -> None:
        counts = {
            "max_requests": max_requests,
            "prefill_chunk": prefill_chunk,
            "canvas_chunk": canvas_chunk,
        }
        if problems := list(_unfit(model, counts=counts)):
            raise ConfigError(problems)
        self.model = model
        self.tokenizer = tokenizer
        self.vocabulary: Vocabulary = tokenizer.vocabulary
        self.max_length = max_length
        self.max_waiting = max_waiting
        self._size_ids = SizeIds.of(tokenizer)
        self._chooser = Chooser(model, vocabulary=self.vocabulary)
        self._denoising = None
        if denoiser is not None:
            self._denoising = Denoising(model, vocabulary=self.vocabulary, denoiser=denoiser)
        if cache_tokens is None:
            cache_tokens = 2 * max_requests * whole_pages(max_length)
        self._cache, self._last_RH = allocate(model, slots=cache_tokens, rows=2 * max_requests)
        self._row = TokenRow(self._cache, slots=cache_tokens)
        self._arena = Arena(cache_tokens, move=self._cache.move)
        self._scheduler = Scheduler(
            arena=self._arena,
            max_requests=max_requests,
            chunk=prefill_chunk,
            headroom=headroom,
            canvas_chunk=canvas_chunk,
        )
        self._incoming: Receiver | None = None
        self._submitted = self._forwards = self._tokens_fed = self._generated = self._forced = 0

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._scheduler.waiting or self._scheduler.active)

    @property
    def stats(self) -> EngineStats:
        """The engine's load and counters now."""
        scheduler, projected = self._scheduler, self._chooser.projected
        return EngineStats(
            waiting=len(scheduler.waiting),
            active=len(scheduler.active),
            cache_used=self._arena.slots - self._arena.free,
            cache_tokens=self._arena.slots,
            forwards=self._forwards,
            tokens_fed=self._tokens_fed,
            tokens_generated=self._generated,
            forced=self._forced,
            preemptions=scheduler.preemptions,
            projected_visual=projected.visual,
            projected_text=projected.text,
            projected_digits=projected.digits,
            denoise_steps=self._denoising.steps if self._denoising else 0,
            images_denoised=self._denoising.images if self._denoising else 0,
        )

    def submit(self, request: Request) -> int:
        """Queue a request; its number.

        Raises:
            ConfigError: for a request that cannot be run, or would never fit the cache.
            QueueFull: ``max_waiting`` requests wait already.
        """
        if problems := [*request.problems(), *self._misfits(request)]:
            raise ConfigError(problems)
        scheduler = self._scheduler
        free = scheduler.max_requests - len(scheduler.active)
        if self.max_waiting is not None and len(scheduler.waiting) >= self.max_waiting + free:
            raise QueueFull(
                f"{len(scheduler.active)} requests run and {len(scheduler.waiting)} wait, the most "
                f"that max_waiting={self.max_waiting} permits; try again later"
            )
        sequence = Sequence(
            index=self._submitted,
            request=request,
            grammar=Grammar(
                vocabulary=self.vocabulary, size_ids=self._size_ids, options=request.grammar
            ),
            tokenizer=self.tokenizer,
            conditional=_stream(request.prompt, request=request),
            unconditional=(
                _stream(request.unconditional, request=request) if request.guided else None
            ),
        )
        sequence.append_forced()
        scheduler.waiting.append(sequence)
        self._submitted += 1
        return sequence.index

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """One forward over everything that is pending, and the tokens that it makes possible."""
        assert self._incoming is None, "the weights are neither the old nor the new ones"
        # Training may have had the model in between: dropout here would be silently wrong.
        self.model.eval()
        self._scheduler.admit()
        with without_shim():
            for sequence in self._scheduler.active:
                if self._denoising is not None and sequence.wants_canvas:
                    sequence.canvas = self._denoising.begin(sequence)
            canvases = self._run(self._scheduler.feed())
            ready = [s for s in self._scheduler.active if s.ready and s.finish is None]
            if ready:
                asked = [(sequence, sequence.next()) for sequence in ready]
                tokens = self._chooser.choose(asked, hidden_RH=self._last_RH)
                for sequence, token in zip(ready, agree_on(tokens), strict=True):
                    sequence.append(token)
                    sequence.append_forced()
            self._denoise(canvases)
        updates = [
            self._update(sequence)
            for sequence in self._scheduler.active
            if len(sequence.tokens) > sequence.reported or sequence.finish
        ]
        self._scheduler.retire()
        return updates

    def run(self) -> list[Generated]:
        """Step until nothing is left; the answers in order of submission."""
        answers: list[Generated] = []
        while self.busy:
            answers += [update.finished for update in self.step() if update.finished]
        return sorted(answers, key=lambda answer: answer.index)

    def stream(self, request: Request) -> Iterator[Update]:
        """Submit ``request`` and step until it has ended, yielding what it gains. Other requests
        advance as well, and their updates are lost; leaving the loop early aborts the request.

        Raises:
            ConfigError, QueueFull: as :meth:`submit`.
        """
        index = self.submit(request)
        try:
            while self.busy:
                for update in self.step():
                    if update.index == index:
                        yield update
                        if update.finished:
                            return
        finally:
            self.abort(index)

    def abort(self, index: int) -> Update | None:
        """End request ``index`` now and free its part of the cache; its last update, or None if it
        has ended before."""
        sequence = self._scheduler.remove(index)
        if sequence is None:
            return None
        sequence.finish = Finish.abort
        return self._update(sequence)

    def begin_weights(self) -> None:
        """New weights come, and nothing is generated until :meth:`finish_weights`."""
        assert not self.busy, "requests in flight have read keys and values of the old weights"
        self._incoming = receiver_of(self.model)

    def write_weights(self, bucket: Bucket) -> None:
        """Put the next ``bucket`` into the model.

        Raises:
            CheckpointError: it does not belong here; nothing was changed.
        """
        assert self._incoming is not None, "begin_weights comes first"
        self._incoming.write(bucket)

    def finish_weights(self) -> None:
        """All has come.

        Raises:
            CheckpointError: it has not.
        """
        assert self._incoming is not None, "begin_weights comes first"
        self._incoming.finish()
        self._incoming = None

    def close(self) -> None:
        """Nothing more will be asked. Only an engine of several ranks has anything to do."""

    def _misfits(self, request: Request) -> list[str]:
        """What would keep ``request`` from ever finishing here."""
        found: list[str] = []
        if request.denoise is not None and self._denoising is None:
            found.append(
                "the request decodes pictures in parallel, but this model was not adapted to that, "
                "or its image tokenizer is not there; use a run or a release of stage=dida with an "
                "image tokenizer, or decode token by token (decoder ar)"
            )
        if request.slots > self.max_length:
            found.append(
                f"{request.slots - request.max_new_tokens} prompt tokens and "
                f"max_new_tokens={request.max_new_tokens} exceed the engine's length "
                f"{self.max_length}; ask for fewer tokens or build it longer"
            )
        prompts = request.prompts
        slots = request_slots(request)
        if slots > self._arena.slots:
            found.append(
                f"the request can fill {slots} slots of the cache ({len(prompts)} streams of "
                f"prompt + max_new_tokens={request.max_new_tokens}), but it has "
                f"{self._arena.slots}; ask for fewer tokens or raise cache_tokens"
            )
        outside = [id for prompt in prompts for id in prompt if not 0 <= id < self.vocabulary.size]
        if outside:
            found.append(
                f"prompt token {outside[0]} lies outside the vocabulary of {self.vocabulary.size} "
                "ids; was it made with another tokenizer?"
            )
        return found

    def _run(self, feeds: list[Feed]) -> dict[Stream, torch.Tensor]:
        """One forward; the hidden states [L, H] of the canvases among ``feeds``, by stream."""
        if not feeds:
            return {}
        tokens_1S, context = self._row.fill(feeds)
        hidden_S1H = self.model(tokens_1S, context=context)
        ends = list(accumulate(feed.count for feed in feeds))
        plain = [(feed, end) for feed, end in zip(feeds, ends, strict=True) if not feed.canvas]
        if plain:
            device = self._last_RH.device
            last_R = torch.tensor([end - 1 for _, end in plain], device=device)
            rows_R = torch.tensor([feed.stream.row for feed, _ in plain], device=device)
            # On a GPU this waits for the forward: whoever leads other ranks relies on it.
            self._last_RH[rows_R] = hidden_S1H[last_R, 0]
        for feed, _ in plain:
            assert feed.stream.extent is not None
            feed.stream.fed += feed.count
            feed.stream.extent.used = feed.stream.fed
        self._forwards += 1
        self._tokens_fed += ends[-1]
        return {
            feed.stream: hidden_S1H[end - feed.count : end, 0]
            for feed, end in zip(feeds, ends, strict=True)
            if feed.canvas
        }

    def _denoise(self, hidden: Mapping[Stream, torch.Tensor]) -> None:
        """A step of every canvas that was fed, and the pictures that this completes."""
        for sequence in self._scheduler.active:
            if self._denoising is None or sequence.conditional not in hidden:
                continue
            other = sequence.unconditional
            tokens = self._denoising.step(
                sequence,
                conditional_LH=hidden[sequence.conditional],
                unconditional_LH=hidden.get(other) if other else None,
            )
            if tokens is not None:
                sequence.commit(tokens)

    def _update(self, sequence: Sequence) -> Update:
        tokens = sequence.tokens[sequence.reported :]
        sequence.reported = len(sequence.tokens)
        self._generated += len(tokens)
        self._forced += sum(token.forced for token in tokens)
        return Update(
            index=sequence.index,
            tokens=tokens,
            finished=self._answer(sequence, sequence.finish) if sequence.finish else None,
        )

    def _answer(self, sequence: Sequence, finish: Finish) -> Generated:
        ids = [token.id for token in sequence.tokens]
        return Generated(
            index=sequence.index,
            tokens=sequence.tokens,
            document=deserialize(ids, self.tokenizer),
            finish=finish,
        )


def _unfit(model: Emu35Model, *, counts: Mapping[str, int]) -> Iterator[str]:
    config = model.config
    for name, size in (
        ("pp", config.pipeline_model_parallel_size),
        ("cp", config.context_parallel_size),
    ):
        if size > 1:
            yield f"{name}={size} cannot generate; load the model with {name}=1 and split it by tp"
    if config.sequence_parallel:
        yield "sp=true cannot generate: one token does not divide over ranks; load it with sp=false"
    for name, value in counts.items():
        if value < 1:
            yield f"{name}={value} must be at least 1"


def _stream(prompt: Iterable[int], *, request: Request) -> Stream:
    tokens = list(prompt)
    return Stream(tokens=tokens, most=len(tokens) + request.max_new_tokens)
