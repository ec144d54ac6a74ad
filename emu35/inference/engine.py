"""The engine: many requests through one cache, a step at a time.

Suffixes: R rows of the cache, S tokens of one forward, N rows sampled together, H hidden size,
V vocabulary.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from emu35.errors import ConfigError
from emu35.inference.grammar import Grammar, Next, NextKind, SizeIds
from emu35.inference.request import Generated, Request
from emu35.inference.sampler import draw, guide
from emu35.inference.scheduler import Feed, Scheduler, Sequence, Stream
from emu35.model.cache import KVCache
from emu35.model.context import AttentionContext
from emu35.model.logits import vocabulary_logits
from emu35.model.mask import AttentionMask
from emu35.model.transformer import Emu35Model
from emu35.tokens.serialize import deserialize
from emu35.tokens.template import Sampling
from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Rows that one call of the sampler can serve."""

    kind: NextKind
    ids: tuple[int, ...]
    sampling: Sampling
    guided: bool


class Engine:
    """Batched generation with a key-value cache.

    ``rows`` is the number of streams in flight (a guided request takes two); ``max_length`` the
    longest prompt plus answer. The model is put into evaluation mode. One process; the model must
    hold the whole vocabulary.
    """

    def __init__(
        self,
        *,
        model: Emu35Model,
        tokenizer: TextTokenizer,
        rows: int,
        max_length: int,
        prefill_chunk: int = 256,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.vocabulary: Vocabulary = tokenizer.vocabulary
        self.max_length = max_length
        self.tokens_generated = 0
        self._rows = rows
        self._device = next(model.parameters()).device
        self._size_ids = SizeIds.of(tokenizer)
        self._scheduler = Scheduler(rows=rows, chunk=prefill_chunk)
        self._submitted = 0
        self._allocate()

    def _allocate(self) -> None:
        """An empty cache with all rows."""
        config, dtype = self.model.lm_config, next(self.model.parameters()).dtype
        self._cache = KVCache(
            num_layers=config.num_layers,
            batch_size=self._rows,
            # A forward writes its padding too, past the end of the rows that need none.
            max_length=self.max_length + self._scheduler.chunk,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            device=self._device,
        )
        # The newest hidden state of every row: a stream whose partner is still reading its prompt
        # keeps what the next token is predicted from.
        self._last_RH = torch.zeros(
            self._rows, config.hidden_size, dtype=dtype, device=self._device
        )

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._scheduler.waiting or self._scheduler.active)

    def submit(self, request: Request) -> int:
        """Queue a request; its number.

        Raises:
            ConfigError: for a request that cannot be run, or does not fit the cache.
        """
        problems = request.problems()
        if request.slots > self.max_length:
            problems.append(
                f"{request.slots - request.max_new_tokens} prompt tokens and "
                f"max_new_tokens={request.max_new_tokens} exceed the engine's length "
                f"{self.max_length}; ask for fewer tokens or build it longer"
            )
        if 1 + request.guided > self._rows:
            problems.append("guidance takes two rows, but the engine has one; give it more")
        if problems:
            raise ConfigError(problems)
        vocabulary = self.vocabulary
        stop_ids = {vocabulary.eos, vocabulary.eoi} if request.stop_at_image else {vocabulary.eos}
        sequence = Sequence(
            index=self._submitted,
            request=request,
            grammar=Grammar(
                vocabulary=vocabulary, size_ids=self._size_ids, options=request.grammar
            ),
            generator=torch.Generator(self._device).manual_seed(request.seed),
            stop_ids=frozenset(stop_ids),
            conditional=Stream(row=-1, pending=list(request.prompt)),
            unconditional=(
                Stream(row=-1, pending=list(request.unconditional)) if request.guided else None
            ),
        )
        sequence.append_forced()
        self._scheduler.waiting.append(sequence)
        self._submitted += 1
        return sequence.index

    @torch.no_grad()
    def step(self) -> list[Generated]:
        """Feed every row once and choose the tokens that this makes possible; the sequences that
        ended by it."""
        self._schedule()
        self._run(self._scheduler.feed())
        return self._postprocess()

    def run(self) -> list[Generated]:
        """Step until nothing is left; the answers in order of submission."""
        answers: list[Generated] = []
        while self.busy:
            answers += self.step()
        return sorted(answers, key=lambda answer: answer.index)

    def _schedule(self) -> None:
        scheduler = self._scheduler
        if not scheduler.active and scheduler.rows < self._rows:
            scheduler.restore(self._rows)
            self._allocate()
        for row in scheduler.admit():
            self._cache.reset_row(row)
        kept = scheduler.compact()
        if kept is not None:
            rows_R = torch.tensor(kept, device=self._device)
            self._cache, self._last_RH = self._cache.select(rows_R), self._last_RH[rows_R]

    def _run(self, feed: Feed) -> None:
        tokens_RS = torch.from_numpy(feed.tokens_RS).to(self._device)
        counts_R = torch.from_numpy(feed.counts_R).to(self._device)
        cache = self._cache
        steps_S = torch.arange(tokens_RS.shape[1], device=self._device)
        slots_RS = cache.lengths_B[:, None] + steps_S
        empty_RS = torch.zeros_like(slots_RS)
        # An idle row sees one key, whatever it holds: its output is not used, and a full row is
        # cheaper for the backends than an empty one.
        end_RS = torch.where(counts_R[:, None] > 0, slots_RS + 1, 1)
        context = AttentionContext(
            positions_BS=slots_RS,
            mask=AttentionMask(
                start1_BS=empty_RS, end1_BS=end_RS, start2_BS=empty_RS, end2_BS=empty_RS
            ),
            cache=cache,
        )
        hidden_SRH = self.model(tokens_RS, context=context)
        fed = np.flatnonzero(feed.counts_R)
        fed_N = torch.from_numpy(fed).to(self._device)
        self._last_RH[fed_N] = hidden_SRH[counts_R[fed_N] - 1, fed_N]
        cache.advance(counts_R)

    def _postprocess(self) -> list[Generated]:
        scheduler = self._scheduler
        ready = [s for s in scheduler.active if s.ready and s.finish is None]
        if ready:
            tokens = self._choose([(sequence, sequence.grammar.next()) for sequence in ready])
            for sequence, token in zip(ready, tokens, strict=True):
                before = len(sequence.ids)
                sequence.append(token)
                sequence.append_forced()
                self.tokens_generated += len(sequence.ids) - before
        return [self._answer(sequence) for sequence in scheduler.retire()]

    def _choose(self, asked: list[tuple[Sequence, Next]]) -> list[int]:
        """The next token of every sequence, sampled in as few groups as their settings allow."""
        groups: defaultdict[_Group, list[int]] = defaultdict(list)
        for at, (sequence, step) in enumerate(asked):
            request = sequence.request
            group = _Group(
                kind=step.kind,
                ids=step.ids,
                sampling=request.text if step.kind is NextKind.TEXT else request.visual,
                guided=request.guided and step.kind is NextKind.VISUAL,
            )
            groups[group].append(at)
        tokens = [0] * len(asked)
        for group, places in groups.items():
            sequences = [asked[at][0] for at in places]
            chosen = self._sample(group, sequences)
            for at, token in zip(places, chosen, strict=True):
                tokens[at] = token
        return tokens

    def _sample(self, group: _Group, sequences: list[Sequence]) -> list[int]:
        scores_NV = self._logits([sequence.conditional.row for sequence in sequences])
        if group.guided:
            pairs = [sequence.unconditional for sequence in sequences]
            scale_N1 = scores_NV.new_tensor([[s.request.guidance] for s in sequences])
            scores_NV = guide(
                scores_NV,
                unconditional_NV=self._logits([stream.row for stream in pairs if stream]),
                scale=scale_N1,
            )
        start = self.vocabulary.visual_start
        match group.kind:
            case NextKind.VISUAL:
                legal_NV, first = scores_NV[:, start:], start
            case NextKind.TEXT:
                legal_NV, first = scores_NV[:, :start], 0
            case _:
                legal_NV, first = scores_NV[:, list(group.ids)], 0
        columns_N = draw(
            legal_NV,
            sampling=group.sampling,
            generators=[sequence.generator for sequence in sequences],
        ).tolist()
        if group.ids:
            return [group.ids[column] for column in columns_N]
        return [first + column for column in columns_N]

    def _logits(self, rows: list[int]) -> torch.Tensor:
        rows_N = torch.tensor(rows, device=self._device)
        return vocabulary_logits(self.model, hidden_NH=self._last_RH[rows_N])

    def _answer(self, sequence: Sequence) -> Generated:
        assert sequence.finish is not None
        return Generated(
            index=sequence.index,
            ids=sequence.ids,
            document=deserialize(sequence.ids, self.tokenizer),
            finish=sequence.finish,
        )
