"""Laying planned samples out as the tensors of a micro-batch.

Shape suffixes: B rows of a micro-batch, S tokens of a row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from emu35.data.items import Items
from emu35.data.plan import Sample
from emu35.data.shards import Codes, decode_runs
from emu35.data.source import Source


@dataclass(kw_only=True, slots=True)
class Batch:
    """One micro-batch, all tensors [B, S] but ``intervals``.

    Attributes:
        tokens: int64 ids; the pad id after the last document of a row.
        labels: int64, the next token of the same document; the pad id where there is none.
        label_modality: uint8, :class:`~emu35.tokens.serialize.Modality` of the label; 0 where
            there is none.
        label_valid: bool, whether there is a label to learn from.
        label_source: int16, which source of the mixture the label is of; 0 where there is none.
        positions: int64, counted from the start of the document; 0 on padding.
        document_start: int64, the column where the token's document starts; S on padding, so
            that no key lies in [start, column].
        sample_ids: number of each row in the global stream; -1 for a row of padding only.
        intervals: int64 [B, S, 4], the keys each row sees
            (:meth:`~emu35.model.mask.AttentionMask.from_intervals`) where that is more than its
            document so far.
        noisy: int16, which noisy copy of its row a token is part of, -1 for none; see
            :mod:`emu35.dida.layout`.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    label_modality: torch.Tensor
    label_valid: torch.Tensor
    label_source: torch.Tensor
    positions: torch.Tensor
    document_start: torch.Tensor
    sample_ids: list[int]
    intervals: torch.Tensor | None = None
    noisy: torch.Tensor | None = None

    def take(self, columns_S: torch.Tensor) -> "Batch":
        """The same rows with some of their columns; ``document_start`` and ``intervals`` keep
        their numbers."""
        return self._map(lambda values: values.index_select(1, columns_S))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on ``device``."""
        return self._map(lambda values: values.to(device, non_blocking=non_blocking))

    def copy(self) -> "Batch":
        """The same in tensors of its own."""
        return self._map(torch.Tensor.clone)

    def erase(self, row: int, columns: slice, *, pad: int) -> None:
        """Turn ``columns`` of ``row`` into padding, in place. ``intervals`` and ``noisy`` are not
        looked after: it is for batches that have none."""
        for name, value in _padding(pad, width=self.tokens.shape[1]).items():
            getattr(self, name)[row, columns] = value

    def widened(self, extra: int, *, pad: int) -> "Batch":
        """With ``extra`` columns of padding behind the others; without ``intervals`` and
        ``noisy``."""
        width = self.tokens.shape[1]
        padding = _padding(pad, width=width + extra)
        wide = {
            name: F.pad(getattr(self, name), (0, extra), value=value)
            for name, value in padding.items()
        }
        # The padding that was there begins behind the new last column as well.
        start_BS = wide["document_start"]
        start_BS[:, :width].masked_fill_(self.document_start == width, width + extra)
        return Batch(**wide, sample_ids=self.sample_ids)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {
            name: change(value) if isinstance(value, torch.Tensor) else value
            for name, value in values.items()
        }
        return type(self)(**changed)


def _padding(pad: int, *, width: int) -> dict[str, int]:
    """What each tensor holds in a column of padding of a row ``width`` columns long."""
    return {
        "tokens": pad,
        "labels": pad,
        "label_modality": 0,
        "label_valid": 0,
        "label_source": 0,
        "positions": 0,
        "document_start": width,
    }


_NO_CODES: Codes = np.zeros(0, np.uint8)

BatchChange = Callable[[Batch], Batch]
"""What a stage does to every batch."""


def as_it_is(batch: Batch) -> Batch:
    """Nothing is done to a batch."""
    return batch


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceItems:
    """A source and the items it was cut into for the current row length."""

    source: Source
    items: Items


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pieces:
    """All pieces of one source in a micro-batch: item numbers and where each one goes."""

    item: list[int]
    row: list[int]
    column: list[int]


def assemble(
    samples: Sequence[Sample | None],
    *,
    sources: Sequence[SourceItems],
    sequence_length: int,
    pad: int,
) -> Batch:
    """Read the items of ``samples`` and lay them out; None gives a row of padding, and so do the
    columns of a document that is damaged and left out.

    Raises:
        DataError: if a document changed after it was indexed and its source refuses that.
    """
    shape_BS = (len(samples), sequence_length)
    tokens_BS = np.full(shape_BS, pad, dtype=np.int64)
    labels_BS = np.full(shape_BS, pad, dtype=np.int64)
    label_modality_BS = np.zeros(shape_BS, dtype=np.uint8)
    valid_BS = np.zeros(shape_BS, dtype=bool)
    label_source_BS = np.zeros(shape_BS, dtype=np.int16)
    positions_BS = np.zeros(shape_BS, dtype=np.int64)
    start_BS = np.full(shape_BS, sequence_length, dtype=np.int64)
    count = np.arange(sequence_length)
    for number, pieces in _place(samples, sources=sources):
        entry = sources[number]
        numbers = np.array(pieces.item, dtype=np.int64)
        starts = entry.items.start[numbers].tolist()
        lengths = entry.items.length[numbers].tolist()
        reader = entry.source.read(entry.items.document[numbers])
        decoded, all_codes = None, _NO_CODES
        for item, row, column, start, length, (words, runs) in zip(
            pieces.item, pieces.row, pieces.column, starts, lengths, reader, strict=True
        ):
            if not len(words):  # damaged; its columns stay padding
                continue
            # The pieces of a packed row share its runs, which are decoded once.
            if runs is not decoded:
                decoded, all_codes = runs, decode_runs(runs)
            codes = all_codes
            if len(codes) != len(words):
                entry.source.leave_out(int(entry.items.document[item]))
                continue
            if len(words) != length:
                words, codes = words[start : start + length], codes[start : start + length]
            end = column + length
            tokens_BS[row, column:end] = words
            labels_BS[row, column : end - 1] = words[1:]
            label_modality_BS[row, column : end - 1] = codes[1:]
            valid_BS[row, column : end - 1] = True
            if number:  # the first source's is there
                label_source_BS[row, column : end - 1] = number
            positions_BS[row, column:end] = count[:length]
            start_BS[row, column:end] = column
    return Batch(
        tokens=torch.as_tensor(tokens_BS),
        labels=torch.as_tensor(labels_BS),
        label_modality=torch.as_tensor(label_modality_BS),
        label_valid=torch.as_tensor(valid_BS),
        label_source=torch.as_tensor(label_source_BS),
        positions=torch.as_tensor(positions_BS),
        document_start=torch.as_tensor(start_BS),
        sample_ids=[-1 if sample is None else sample.number for sample in samples],
    )


def _place(
    samples: Sequence[Sample | None], *, sources: Sequence[SourceItems]
) -> Iterator[tuple[int, _Pieces]]:
    """The pieces of all rows by number of their source, so that each source is looked up once."""
    pieces = [_Pieces(item=[], row=[], column=[]) for _ in sources]
    lengths = [entry.items.length for entry in sources]
    for row, sample in enumerate(samples):
        column = 0
        for source, item in sample.items if sample is not None else ():
            found = pieces[source]
            found.item.append(item)
            found.row.append(row)
            found.column.append(column)
            column += int(lengths[source][item])
    for number, found in enumerate(pieces):
        if found.item:
            yield number, found
