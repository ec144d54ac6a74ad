"""A packed row with noisy copies of its pictures behind it.

The clean row stays as the loader made it, in columns [0, C). Behind it there is room for copies;
that of a picture is ``IMG body``, body being its codes and row ends, with the positions of the
clean ones, so that only attention tells a copy from its original::

    row i of a document that begins at d     sees [d, i + 1)
    a copy's row, of a picture with IMG at a   sees [d, a) and the whole copy

The end a is exclusive, for the answer begins behind it. Prediction keeps the shift by one: the copy
of IMG predicts the first code. Row ends are given, hence clean in the copy and never a label in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from emu35.data.batch import Batch
from emu35.errors import DataError
from emu35.parallel.noise import seed_for, uniform
from emu35.tokens.serialize import Modality
from emu35.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A whole picture of a row: the columns of IMG and of EOI, and of its document's beginning."""

    img: int
    eoi: int
    document: int

    @property
    def length(self) -> int:
        """Tokens of a copy: IMG and the body."""
        return self.eoi - self.img


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisyCopies:
    """Makes batches with copies; a :class:`~emu35.data.loader.TokenLoader` may apply it.

    Attributes:
        vocabulary: where IMG, EOI and the codes lie.
        room: columns behind the clean row.
        per_document: most copies a document gets, of pictures drawn from it; 0 for all that fit.
        answers_only: whether only pictures of responses, behind a BSS of their document and not
            behind its ESS, get copies.
        seed: of the draw, a function of it, the row's number and the picture's place.
    """

    vocabulary: Vocabulary
    room: int
    per_document: int = 0
    answers_only: bool = False
    seed: int = 0

    def __call__(self, batch: Batch) -> Batch:
        """``batch`` [B, C] with copies, [B, C + room]: ``intervals`` say what every row sees, and
        ``noisy`` numbers the copies of a row, -1 elsewhere. The codes in the copies are the clean
        ones; corrupting them is another's business. Only they are labels there."""
        width = batch.tokens.shape[1]
        wide = _widened(batch, room=self.room, pad=self.vocabulary.pad)
        for row, tokens_S in enumerate(batch.tokens):
            column = width
            pictures = self._candidates(tokens_S, batch.document_start[row])
            chosen = self._chosen(pictures, sample=batch.sample_ids[row])
            for number, picture in enumerate(chosen):
                self._copy(wide, row=row, column=column, picture=picture, number=number)
                column += picture.length
        return wide

    def tally(self, batch: Batch) -> dict[str, float]:
        """Of a batch with copies: ``pictures`` that might have one and ``pictures_copied``.

        Raises:
            DataError: there are such pictures, and every one is longer than the whole room.
        """
        assert batch.noisy is not None
        pictures: list[Picture] = []
        copied = 0
        for tokens_S, start_S, noisy_S in zip(
            batch.tokens, batch.document_start, batch.noisy, strict=True
        ):
            clean_S = noisy_S < 0
            pictures += self._candidates(tokens_S[clean_S], start_S[clean_S])
            copied += int(noisy_S.max()) + 1
        shortest = min((picture.length for picture in pictures), default=0)
        if shortest > self.room:
            raise DataError(
                f"stage.noisy_length={self.room} has no room for any of the {len(pictures)} "
                f"pictures of a batch; the smallest of them needs {shortest}"
            )
        return {"pictures": float(len(pictures)), "pictures_copied": float(copied)}

    def _candidates(self, tokens_S: torch.Tensor, document_start_S: torch.Tensor) -> list[Picture]:
        return list(
            find_pictures(
                tokens_S, document_start_S, self.vocabulary, answers_only=self.answers_only
            )
        )

    def _chosen(self, pictures: Sequence[Picture], *, sample: int) -> list[Picture]:
        """Those that get a copy, in their order, as far as the room goes."""
        chosen: list[Picture] = []
        room, copies = self.room, dict[int, int]()
        for picture in self._by_turn(pictures, sample=sample):
            had = copies.get(picture.document, 0)
            if picture.length > room or (self.per_document and had >= self.per_document):
                continue
            copies[picture.document] = had + 1
            room -= picture.length
            chosen.append(picture)
        return sorted(chosen, key=lambda picture: picture.img)

    def _by_turn(self, pictures: Sequence[Picture], *, sample: int) -> list[Picture]:
        """In the order in which they may ask for room: as drawn where not all of a document's can
        have it, else as they come."""
        if not self.per_document or not pictures:
            return list(pictures)
        noise_1P = uniform(
            torch.tensor([seed_for("dida/copies", seed=self.seed)]),
            positions_N=torch.tensor([sample]),
            ids_NM=torch.tensor([[picture.img for picture in pictures]]),
        )
        return [pictures[at] for at in noise_1P[0].argsort().tolist()]

    def _copy(self, wide: Batch, *, row: int, column: int, picture: Picture, number: int) -> None:
        assert wide.intervals is not None
        assert wide.noisy is not None
        clean = slice(picture.img, picture.eoi)
        copy = slice(column, column + picture.length)
        for name in ("tokens", "labels", "label_modality", "label_source", "positions"):
            values_S = getattr(wide, name)[row]
            values_S[copy] = values_S[clean]
        wide.label_valid[row, copy] = wide.label_modality[row, copy] == Modality.VISUAL
        wide.document_start[row, copy] = picture.document
        wide.noisy[row, copy] = number
        wide.intervals[row, copy] = torch.tensor(
            [picture.document, picture.img, copy.start, copy.stop]
        )


def find_pictures(
    tokens_S: torch.Tensor,
    document_start_S: torch.Tensor,
    vocabulary: Vocabulary,
    *,
    answers_only: bool = False,
) -> Iterator[Picture]:
    """The whole pictures of a row, in order, or those of responses alone. One whose end is not in
    the row is none."""
    ids = torch.tensor([vocabulary.img, vocabulary.eoi, vocabulary.bss, vocabulary.ess])
    marks = torch.isin(tokens_S, ids).nonzero().squeeze(1)
    found = zip(
        tokens_S[marks].tolist(), marks.tolist(), document_start_S[marks].tolist(), strict=True
    )
    img = document = -1  # the column of the newest IMG that may still end well, and its document
    answering = -1  # the document that is inside a response
    for id, column, start in found:
        if id == vocabulary.img:
            img, document = column, start
            continue
        if id != vocabulary.eoi:
            answering = start if id == vocabulary.bss else -1
        elif (
            0 <= img < column - 1 and document == start and (answering == start or not answers_only)
        ):
            yield Picture(img=img, eoi=column, document=start)
        img = -1


def _widened(batch: Batch, *, room: int, pad: int) -> Batch:
    """``batch`` with ``room`` columns of padding behind it, and its causal intervals."""
    wide = batch.widened(room, pad=pad)
    start_BS = wide.document_start
    rows, total = start_BS.shape
    end_BS = torch.arange(1, total + 1).expand(rows, -1)
    zero_BS = torch.zeros_like(start_BS)
    return replace(
        wide,
        intervals=torch.stack([start_BS, end_BS, zero_BS, zero_BS], -1),
        noisy=torch.full((rows, total), -1, dtype=torch.int16),
    )
