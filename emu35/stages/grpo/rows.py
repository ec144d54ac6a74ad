"""Rollouts as the packed rows of a training step.

A rollout is a document: its prompt and its answer. With guidance its unconditional stream stands
right behind it in the same row, a document of its own, so that one forward gives both hidden states
that a guided choice was made from. Rows are filled best fit decreasing; what every label was chosen
from, and what is known of it, lies beside it.

Suffixes: B rows of a micro-batch, S columns, M sampled tokens of a micro-batch, F candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emu35.data.batch import Batch
from emu35.data.pack import best_fit_decreasing
from emu35.errors import DataError
from emu35.inference.grammar import SizeIds
from emu35.model.policy import Choices, LegalSet
from emu35.stages.grpo.replay import Legal, legal_sets
from emu35.stages.grpo.types import Rollout, TokenKind
from emu35.tokens.serialize import Modality
from emu35.tokens.text import TextTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """A rollout to learn from; ``weight`` is what each of its sampled tokens counts in the loss,
    the denominators of the global batch included."""

    rollout: Rollout
    advantage: float
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Supports:
    """What sampled tokens were chosen from: the legal sets that occur, and ``kept``, for every
    sampled token of the micro-batch by its number, the ids that top-k and top-p left (None: all).
    """

    sets: Sequence[LegalSet]
    kept: Sequence[NDArray[np.int32] | None]


@dataclass(kw_only=True, slots=True)
class Known:
    """What the trainer found about the sampled tokens of this rank's columns of a micro-batch
    before the first update, fp32 [N]: ``old_N``, log-probabilities under the behaviour policy;
    ``reference_N``, unfiltered ones of the reference; ``correction_N``, importance weights. None
    where nobody asked, or on another pipeline stage."""

    old_N: torch.Tensor | None = None
    reference_N: torch.Tensor | None = None
    correction_N: torch.Tensor | None = None


@dataclass(kw_only=True, slots=True)
class PolicyBatch(Batch):
    """A micro-batch of rollouts: :class:`~emu35.data.batch.Batch`, and of every label, [B, S]:

    Attributes:
        sampled: bool, whether it was sampled (not given, not forced).
        behaviour: fp32, its log-probability when it was.
        advantage, weight: fp32, those of its rollout.
        temperature: fp32, that it was drawn with.
        guidance: fp32, the scale it was drawn with; 1 where none.
        partner: int64, the column whose hidden state guided it; its own where none did.
        legal: int64, which of ``supports.sets`` it was chosen from.
        number: int64, its number among the sampled tokens of this micro-batch; -1 for none.
        answer: int64, the number of its rollout among those of this micro-batch; -1 for none.
        answers: how many there are.
        guided: whether any of them was drawn with guidance.
        supports: see :class:`Supports`.
        known: see :class:`Known`; shared by everything that is made of this batch.
    """

    sampled: torch.Tensor
    behaviour: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor
    temperature: torch.Tensor
    guidance: torch.Tensor
    partner: torch.Tensor
    legal: torch.Tensor
    number: torch.Tensor
    answer: torch.Tensor
    answers: int
    guided: bool
    supports: Supports
    known: Known = field(default_factory=Known)

    @property
    def chosen_N(self) -> torch.Tensor:
        """Places of the sampled labels in the columns laid end to end, [S x B]; int64."""
        return self.sampled.t().reshape(-1).nonzero().squeeze(1)

    def of(self, name: str, chosen_N: torch.Tensor) -> torch.Tensor:
        """The values [N] of one of the tensors [B, S] at those places."""
        values_BS: torch.Tensor = getattr(self, name)
        return values_BS.t().reshape(-1)[chosen_N]

    def choices(self, chosen_N: torch.Tensor) -> Choices:
        """What the labels at those places were chosen from."""
        device = chosen_N.device
        kept = [self.supports.kept[number] for number in self.of("number", chosen_N).tolist()]
        counts = [0 if ids_K is None else len(ids_K) for ids_K in kept]
        ids = [ids_K for ids_K in kept if ids_K is not None]
        ids_F = np.concatenate(ids) if ids else np.empty(0, dtype=np.int32)
        return Choices(
            ids_N=self.of("labels", chosen_N),
            temperature_N=self.of("temperature", chosen_N),
            sets=self.supports.sets,
            legal_N=self.of("legal", chosen_N),
            candidates_F=torch.from_numpy(ids_F.astype(np.int64)).to(device),
            ends_N=torch.tensor(counts, dtype=torch.int64, device=device).cumsum(0),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Piece:
    """A rollout as it will stand in a row: the tokens of its streams, and what is legal where."""

    learned: Learned
    legal: Legal
    tokens: NDArray[np.int64]
    unconditional: NDArray[np.int64]

    @property
    def length(self) -> int:
        return len(self.tokens) + len(self.unconditional)


def lay_out(
    learned: Sequence[Learned],
    *,
    tokenizer: TextTokenizer,
    sequence_length: int,
    micro_batch_size: int,
    multiple: int = 1,
    at_least: int = 1,
) -> list[PolicyBatch]:
    """Pack rollouts into micro-batches [micro_batch_size, sequence_length].

    Args:
        multiple: micro-batches come in multiples of it; the last ones may be padding.
        at_least: micro-batches, padding if need be.

    Raises:
        DataError: a rollout is longer than a row, or not what its behaviour policy could have
            drawn.
    """
    vocabulary, size_ids = tokenizer.vocabulary, SizeIds.of(tokenizer)
    pieces = []
    for item in learned:
        legal = legal_sets(item.rollout, vocabulary=vocabulary, size_ids=size_ids)
        pieces.append(_piece(item, legal=legal, sequence_length=sequence_length))
    lengths = [piece.length for piece in pieces]
    rows = best_fit_decreasing(lengths=lengths, capacity=sequence_length)
    count = max(at_least, -(-len(rows) // micro_batch_size))
    count = -(-count // multiple) * multiple
    rows += [[] for _ in range(count * micro_batch_size - len(rows))]
    return [
        _batch(
            [[pieces[number] for number in row] for row in rows[first : first + micro_batch_size]],
            sequence_length=sequence_length,
            pad=vocabulary.pad,
        )
        for first in range(0, len(rows), micro_batch_size)
    ]


def _piece(item: Learned, *, legal: Legal, sequence_length: int) -> _Piece:
    rollout = item.rollout
    ids = rollout.ids.astype(np.int64)
    # Nothing is predicted from the last token.
    tokens = np.concatenate([rollout.prompt_ids, ids[:-1]])
    unconditional = np.empty(0, dtype=np.int64)
    if rollout.behaviour.guidance != 1.0 and len(rollout.unconditional_ids):
        seen = ids[:-1][legal.both_T[:-1]]
        unconditional = np.concatenate([rollout.unconditional_ids, seen])
    piece = _Piece(
        learned=item,
        legal=legal,
        tokens=tokens.astype(np.int64),
        unconditional=unconditional.astype(np.int64),
    )
    if piece.length > sequence_length:
        raise DataError(
            f"a rollout takes {piece.length} tokens of a row, but data.sequence_length="
            f"{sequence_length}; make rows longer, answers shorter (max_new_tokens), or sample "
            "without guidance, which needs a second stream in the row"
        )
    return piece


def _batch(rows: Sequence[Sequence[_Piece]], *, sequence_length: int, pad: int) -> PolicyBatch:
    shape_BS = (len(rows), sequence_length)
    columns_S = np.arange(sequence_length)
    arrays = {
        "tokens": np.full(shape_BS, pad, dtype=np.int64),
        "labels": np.full(shape_BS, pad, dtype=np.int64),
        "label_modality": np.zeros(shape_BS, dtype=np.uint8),
        "label_valid": np.zeros(shape_BS, dtype=bool),
        "label_source": np.zeros(shape_BS, dtype=np.int16),
        "positions": np.zeros(shape_BS, dtype=np.int64),
        "document_start": np.full(shape_BS, sequence_length, dtype=np.int64),
        "sampled": np.zeros(shape_BS, dtype=bool),
        "behaviour": np.zeros(shape_BS, dtype=np.float32),
        "advantage": np.zeros(shape_BS, dtype=np.float32),
        "weight": np.zeros(shape_BS, dtype=np.float32),
        "temperature": np.ones(shape_BS, dtype=np.float32),
        "guidance": np.ones(shape_BS, dtype=np.float32),
        "partner": np.broadcast_to(columns_S, shape_BS).copy(),
        "legal": np.zeros(shape_BS, dtype=np.int64),
        "number": np.full(shape_BS, -1, dtype=np.int64),
        "answer": np.full(shape_BS, -1, dtype=np.int64),
    }
    sets: dict[LegalSet, int] = {}
    kept: list[NDArray[np.int32] | None] = []
    answers = 0
    for row, pieces in enumerate(rows):
        column = 0
        for piece in pieces:
            views = {name: values[row] for name, values in arrays.items()}
            _place(piece, views, column=column, sets=sets, kept=kept)
            labels_S = views["label_valid"] & (views["answer"] < 0)
            views["answer"][labels_S] = answers
            answers += 1
            column += piece.length
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return PolicyBatch(
        **tensors,
        sample_ids=[-1] * len(rows),
        answers=answers,
        guided=any(len(piece.unconditional) > 0 for row in rows for piece in row),
        supports=Supports(sets=list(sets), kept=kept),
    )


def _place(
    piece: _Piece,
    row: dict[str, NDArray],
    *,
    column: int,
    sets: dict[LegalSet, int],
    kept: list[NDArray[np.int32] | None],
) -> None:
    """Write one rollout into the arrays of its row, from ``column`` on."""
    rollout, behaviour = piece.learned.rollout, piece.learned.rollout.behaviour
    middle, end = column + len(piece.tokens), column + piece.length
    for start, stop, tokens in (
        (column, middle, piece.tokens),
        (middle, end, piece.unconditional),
    ):
        row["tokens"][start:stop] = tokens
        row["positions"][start:stop] = np.arange(stop - start)
        row["document_start"][start:stop] = start
    first = column + len(rollout.prompt_ids) - 1
    labels = slice(first, first + len(rollout.ids))
    row["labels"][labels] = rollout.ids
    visual_T = rollout.kinds == TokenKind.visual
    row["label_modality"][labels] = np.where(visual_T, Modality.VISUAL, Modality.TEXT)
    row["label_valid"][labels] = True
    sampled_T = ~rollout.forced
    row["sampled"][labels] = sampled_T
    row["behaviour"][labels] = rollout.logprobs
    row["advantage"][labels] = piece.learned.advantage
    row["weight"][labels] = np.where(sampled_T, piece.learned.weight, 0.0)
    warm = np.isin(rollout.kinds, (TokenKind.visual, TokenKind.among))
    row["temperature"][labels] = np.where(
        warm, behaviour.visual.temperature, behaviour.text.temperature
    )
    row["legal"][labels] = [sets.setdefault(found, len(sets)) for found in piece.legal.sets]
    numbers = np.full(len(rollout.ids), -1)
    numbers[sampled_T] = len(kept) + np.arange(int(sampled_T.sum()))
    row["number"][labels] = numbers
    every = rollout.candidates or [None] * len(rollout.ids)
    kept += [ids for ids, sampled in zip(every, sampled_T, strict=True) if sampled]
    if len(piece.unconditional):
        # Before token t the unconditional stream has seen those of the first t that both see.
        seen_T = np.cumsum(piece.legal.both_T) - piece.legal.both_T
        partner_T = middle + len(rollout.unconditional_ids) + seen_T - 1
        own_T = np.arange(labels.start, labels.stop)
        row["partner"][labels] = np.where(visual_T, partner_T, own_T)
        row["guidance"][labels] = np.where(visual_T, behaviour.guidance, 1.0)
