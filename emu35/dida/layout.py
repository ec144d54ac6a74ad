"""A packed row with noisy copies of its pictures behind it.

The clean row stays as the loader made it, in columns [0, C). Behind it there is room for copies;
that of a picture is ``IMG body``, body being its codes and row ends, with the positions of the
clean ones, so that only attention tells a copy from its original::

    row i of a document that begins at d     sees [d, i + 1)
    a copy's row, of a picture with IMG at a   sees [d, a) and the whole copy

The end a is exclusive. One more, and the copy would see the clean IMG, whose layers above the first
know nothing that the copy does not; but with a label of the next code at every clean token behind
it, seeing any of those is seeing the answer. Prediction keeps the shift by one: the copy of IMG
predicts the first code. Row ends are given, hence clean in the copy and never a label in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from emu35.data.batch import Batch
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
        per_document: most copies a document gets, its first pictures; 0 for all that fit.
    """

    vocabulary: Vocabulary
    room: int
    per_document: int = 0

    def __call__(self, batch: Batch) -> Batch:
        """``batch`` [B, C] with copies, [B, C + room]: ``intervals`` say what every row sees, and
        ``noisy`` numbers the copies of a row, -1 elsewhere. The codes in the copies are the clean
        ones; corrupting them is another's business. Only they are labels there."""
        width = batch.tokens.shape[1]
        wide = _widened(batch, room=self.room, pad=self.vocabulary.pad)
        for row, tokens_S in enumerate(batch.tokens):
            column = width
            pictures = list(find_pictures(tokens_S, batch.document_start[row], self.vocabulary))
            for number, picture in enumerate(self._chosen(pictures)):
                self._copy(wide, row=row, column=column, picture=picture, number=number)
                column += picture.length
        return wide

    def _chosen(self, pictures: Sequence[Picture]) -> list[Picture]:
        """The first pictures of each document, as far as the room goes."""
        chosen: list[Picture] = []
        room, copies = self.room, dict[int, int]()
        for picture in pictures:
            had = copies.get(picture.document, 0)
            if self.per_document and had >= self.per_document:
                continue
            if picture.length > room:
                continue
            copies[picture.document] = had + 1
            room -= picture.length
            chosen.append(picture)
        return chosen

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


def tally_copies(batch: Batch, *, vocabulary: Vocabulary) -> dict[str, float]:
    """``pictures`` of a batch with copies and how many of them got one, ``pictures_copied``."""
    assert batch.noisy is not None
    rows = zip(batch.tokens, batch.document_start, batch.noisy, strict=True)
    pictures = copied = 0
    for tokens_S, start_S, noisy_S in rows:
        clean_S = noisy_S < 0
        pictures += len(list(find_pictures(tokens_S[clean_S], start_S[clean_S], vocabulary)))
        copied += int(noisy_S.max()) + 1
    return {"pictures": float(pictures), "pictures_copied": float(copied)}


def find_pictures(
    tokens_S: torch.Tensor, document_start_S: torch.Tensor, vocabulary: Vocabulary
) -> Iterator[Picture]:
    """The whole pictures of a row, in order. One whose end is not in the row is none."""
    marks = ((tokens_S == vocabulary.img) | (tokens_S == vocabulary.eoi)).nonzero().squeeze(1)
    ids, starts = tokens_S[marks].tolist(), document_start_S[marks].tolist()
    columns = marks.tolist()
    for at in range(len(columns) - 1):
        if ids[at] != vocabulary.img or ids[at + 1] != vocabulary.eoi:
            continue
        if starts[at] == starts[at + 1] and columns[at + 1] - columns[at] > 1:
            yield Picture(img=columns[at], eoi=columns[at + 1], document=starts[at])


def _widened(batch: Batch, *, room: int, pad: int) -> Batch:
    """``batch`` with ``room`` columns of padding behind it, and its causal intervals."""
    rows, width = batch.tokens.shape
    total = width + room

    def more(values_BS: torch.Tensor, value: int) -> torch.Tensor:
        return F.pad(values_BS, (0, room), value=value)

    # Padding's document begins behind the row, so that it sees nothing.
    start_BS = batch.document_start.masked_fill(batch.document_start == width, total)
    start_BS = more(start_BS, total)
    end_S = torch.arange(1, total + 1)
    zero_BS = torch.zeros_like(start_BS)
    intervals = torch.stack([start_BS, end_S.expand(rows, -1), zero_BS, zero_BS], -1)
    return replace(
        batch,
        tokens=more(batch.tokens, pad),
        labels=more(batch.labels, pad),
        label_modality=more(batch.label_modality, 0),
        label_valid=more(batch.label_valid, 0),
        label_source=more(batch.label_source, 0),
        positions=more(batch.positions, 0),
        document_start=start_BS,
        intervals=intervals.contiguous(),
        noisy=torch.full((rows, total), -1, dtype=torch.int16),
    )
