"""From hidden states to the next tokens of many sequences.

Each kind of step reads its own rows of the vocabulary projection and no others: visual ids at
visual positions, text ids at text positions, a dozen rows for the digits of a size. The time of a
visual token is therefore independent of the size of the text vocabulary.

Guidance u + s (c - u) is linear and so is the projection: the two hidden states are combined
first, and one row is projected in place of two. On logits instead of log-probabilities the result
differs by a constant a row, which no later step can see (:mod:`emu35.inference.sampler`).

Suffixes: N sequences chosen together, H hidden size, V ids of a legal range.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from emu35.inference.grammar import Next, NextKind
from emu35.inference.request import Token
from emu35.inference.sampler import Drawn, draw, guide_hidden
from emu35.inference.scheduler import Sequence
from emu35.model.logits import id_logits, range_logits
from emu35.model.transformer import Emu35Model
from emu35.tokens.template import Sampling
from emu35.tokens.vocabulary import Vocabulary


@dataclass(kw_only=True, slots=True)
class ProjectionStats:
    """Hidden rows projected so far, by what they were projected on. A forced token adds none, a
    guided visual token adds one."""

    visual: int = 0
    text: int = 0
    digits: int = 0


class Chooser:
    """Chooses the next token of sequences from ``hidden_RH``, the newest hidden state of every
    stream by its row."""

    def __init__(self, model: Emu35Model, *, vocabulary: Vocabulary) -> None:
        self.projected = ProjectionStats()
        self._model = model
        self._vocabulary = vocabulary

    def choose(self, asked: list[tuple[Sequence, Next]], *, hidden_RH: torch.Tensor) -> list[Token]:
        """The next token of every sequence. Sequences that ask for the same ids share a
        projection; among them, those with the same numbers share a draw."""
        groups: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
        for at, (_, step) in enumerate(asked):
            ids = step.ranges if step.kind is NextKind.AMONG else ()
            groups[(step.kind, ids)].append(at)
        tokens: list[Token | None] = [None] * len(asked)
        for places in groups.values():
            sequences = [asked[at][0] for at in places]
            steps = [asked[at][1] for at in places]
            chosen = self._choose_alike(sequences, steps=steps, hidden_RH=hidden_RH)
            for at, token in zip(places, chosen, strict=True):
                tokens[at] = token
        return [token for token in tokens if token is not None]

    def _choose_alike(
        self, sequences: list[Sequence], *, steps: list[Next], hidden_RH: torch.Tensor
    ) -> list[Token]:
        kind, vocabulary = steps[0].kind, self._vocabulary
        hidden_NH = _hidden(sequences, guided=kind is NextKind.VISUAL, hidden_RH=hidden_RH)
        match kind:
            case NextKind.VISUAL:
                self.projected.visual += len(sequences)
                ids = range(vocabulary.visual_start, vocabulary.size)
                scores_NV = self._range(hidden_NH, ids)
            case NextKind.TEXT:
                self.projected.text += len(sequences)
                ids = range(vocabulary.visual_start)
                scores_NV = self._range(hidden_NH, ids)
                for scores_V, step in zip(scores_NV, steps, strict=True):
                    _forbid_gaps(scores_V, step=step)
            case _:
                self.projected.digits += len(sequences)
                ids = steps[0].ids
                scores_NV = id_logits(self._model, hidden_NH=hidden_NH, ids=ids)
        return _draw_groups(sequences, kind=kind, ids=ids, scores_NV=scores_NV)

    def _range(self, hidden_NH: torch.Tensor, ids: range) -> torch.Tensor:
        return range_logits(self._model, hidden_NH=hidden_NH, start=ids.start, end=ids.stop)


def _hidden(sequences: list[Sequence], *, guided: bool, hidden_RH: torch.Tensor) -> torch.Tensor:
    """What is projected: the conditional hidden states, or the guided ones."""
    rows_N = torch.tensor([s.conditional.row for s in sequences], device=hidden_RH.device)
    conditional_NH = hidden_RH[rows_N]
    if not guided or not any(s.unconditional for s in sequences):
        return conditional_NH
    # A sequence without guidance is its own unconditional stream: c + s (c - c) = c.
    rows_N = torch.tensor(
        [(s.unconditional or s.conditional).row for s in sequences], device=hidden_RH.device
    )
    scale_N1 = torch.tensor(
        [[s.request.guidance] for s in sequences], dtype=torch.float32, device=hidden_RH.device
    )
    return guide_hidden(conditional_NH, unconditional_NH=hidden_RH[rows_N], scale_N1=scale_N1)


def _forbid_gaps(scores_V: torch.Tensor, *, step: Next) -> None:
    """-inf for the ids between the legal ranges."""
    begin = 0
    for start, end in (*step.ranges, (len(scores_V), len(scores_V))):
        scores_V[begin:start] = -torch.inf
        begin = end


def _draw_groups(
    sequences: list[Sequence],
    *,
    kind: NextKind,
    ids: "range | tuple[int, ...]",
    scores_NV: torch.Tensor,
) -> list[Token]:
    groups: defaultdict[Sampling, list[int]] = defaultdict(list)
    for at, sequence in enumerate(sequences):
        request = sequence.request
        groups[request.text if kind is NextKind.TEXT else request.visual].append(at)
    tokens: dict[int, Token] = {}
    for sampling, places in groups.items():
        chosen = [sequences[at] for at in places]
        top = max(sequence.request.top_logprobs for sequence in chosen)
        scores_MV = scores_NV if len(places) == len(sequences) else scores_NV[places]
        drawn = draw(
            scores_MV,
            sampling=sampling,
            seeds_N=torch.tensor([s.request.seed for s in chosen], device=scores_NV.device),
            positions_N=torch.tensor([len(s.tokens) for s in chosen], device=scores_NV.device),
            ids=ids,
            top=top,
            keep=any(sequence.request.keep_candidates for sequence in chosen),
        )
        tokens |= zip(places, _tokens(drawn, chosen, kind=kind, ids=ids), strict=True)
    return [tokens[at] for at in range(len(sequences))]


def _tokens(
    drawn: Drawn, sequences: list[Sequence], *, kind: NextKind, ids: "range | tuple[int, ...]"
) -> list[Token]:
    columns, logprobs = drawn.columns_N.tolist(), drawn.logprobs_N.tolist()
    support = drawn.support_N.tolist()
    top_columns, top_logprobs = drawn.top_columns_NT.tolist(), drawn.top_logprobs_NT.tolist()
    ids_V = np.arange(ids.start, ids.stop) if isinstance(ids, range) else np.array(ids)
    tokens: list[Token] = []
    for n, sequence in enumerate(sequences):
        columns_K = drawn.kept[n] if sequence.request.keep_candidates else None
        pairs = zip(top_columns[n], top_logprobs[n], strict=True)
        best = [(ids[column], value) for column, value in pairs if value > -torch.inf]
        tokens.append(
            Token(
                id=ids[columns[n]],
                kind=kind,
                logprob=logprobs[n],
                support=support[n],
                top=tuple(best[: sequence.request.top_logprobs]),
                candidates=None if columns_K is None else ids_V[columns_K.numpy()].astype(np.int32),
            )
        )
    return tokens
