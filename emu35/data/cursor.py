"""Walking one source: its documents in shuffled order, or the rows it was packed into before.

What is shuffled, counted in epochs and limited is a unit: a document with all its pieces, which
come one after the other from its beginning to its end, or a whole packed row. A window of units is
looked up at once and becomes an array of codes, plain integers (:mod:`~emu35.data.pack`).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emu35.data.order import SourceOrder
from emu35.data.pack import LENGTH_BITS, LENGTH_MASK, ROW, PackedRows

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """What one source has to give. U units, N pieces.

    Attributes:
        length: [U] tokens of each unit.
        documents: [U] documents in each, None where that is one.
        per_shard: [shards] units of each shard.
        first, pieces: [U] the first piece of each unit and how many it has; None where every unit
            is one piece, of the same number.
        piece_length: [N] tokens of each piece.
        whole: units are packed rows.
    """

    length: Ints
    documents: Ints | None
    per_shard: Ints
    first: Ints | None
    pieces: Ints | None
    piece_length: Ints
    whole: bool


def document_units(*, length: Ints, per_shard: Ints, document: Ints | None) -> Units:
    """Documents as units.

    Args:
        length: [N] tokens of each piece, shard after shard, ``per_shard`` [shards] of each.
        document: [N] what document a piece is of, equal for its pieces, which are neighbours; None:
            each is a document.
    """
    first = None if document is None else np.flatnonzero(np.diff(document, prepend=-1))
    if first is None or len(first) == len(length):
        return Units(
            length=length,
            documents=None,
            per_shard=per_shard,
            first=None,
            pieces=None,
            piece_length=length,
            whole=False,
        )
    shard = np.searchsorted(np.cumsum(per_shard), first, side="right")
    return Units(
        length=np.add.reduceat(length, first),
        documents=None,
        per_shard=np.bincount(shard, minlength=len(per_shard)).astype(np.int64),
        first=first,
        pieces=np.diff(first, append=len(length)),
        piece_length=length,
        whole=False,
    )


def row_units(rows: PackedRows, *, document: Ints | None, window: int) -> Units:
    """Packed rows as units; ``document`` as for :func:`document_units`. A document counts in the
    row that holds its first piece."""
    begins = None if document is None else np.diff(document, prepend=-1) > 0
    documents = [
        len(items) if begins is None else int(begins[items].sum())
        for items in (rows.items(row) for row in range(len(rows)))
    ]
    per_shard = rows.per_shard
    if per_shard is None:
        # Rows lie nowhere; blocks as large as the window change places from epoch to epoch.
        per_shard = np.diff(np.append(np.arange(0, len(rows), window), len(rows)))
    return Units(
        length=rows.length,
        documents=np.array(documents, np.int64),
        per_shard=per_shard,
        first=None,
        pieces=None,
        piece_length=rows.length,
        whole=True,
    )


class Cursor:
    """Walks the units of a source epoch after epoch, up to its end where it has one.

    :attr:`left` is what is left of the present window; when nothing is, :meth:`refill` goes on to
    the next.
    """

    def __init__(
        self,
        units: Units,
        *,
        order: SourceOrder,
        number: int,
        epochs: float | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """``number`` is that of the source's first item among the items of all sources."""
        self.units, self.order, self.number = units, order, number
        self._max_units = None if epochs is None else max(1, round(epochs * order.size))
        self._max_tokens = max_tokens
        self.seek(epoch=0, position=0, piece=0, drawn=0)

    @property
    def left(self) -> Ints:
        """The codes of the present window that are still to come."""
        return self._codes[self._done :]

    def advance(self, count: int) -> None:
        """Go past the first ``count`` of :attr:`left`."""
        self._done += count

    @property
    def available(self) -> int | None:
        """About how many tokens come at most; None: there is no end."""
        bounds: list[int] = []
        if self._max_units is not None:
            bounds.append(int(self.units.length.sum() * (self._max_units / self.order.size)))
        if self._max_tokens is not None:
            bounds.append(self._max_tokens)
        return min(bounds) if bounds else None

    def count_documents(self, numbers: Ints) -> int:
        """Documents that begin in ``numbers``: pieces of this source, or its packed rows."""
        units = self.units
        if units.documents is not None:
            return int(units.documents[numbers].sum())
        if units.first is None:
            return len(numbers)
        place = np.searchsorted(units.first, numbers, side="right") - 1
        return int((units.first[place] == numbers).sum())

    def seek(self, *, epoch: int, position: int, piece: int, drawn: int) -> None:
        """Stand before ``piece`` of the unit at ``position`` of ``epoch``, with ``drawn`` tokens
        drawn so far."""
        window, place = divmod(position, self.order.window)
        codes = self._load(epoch=epoch, window=window, before=None)
        begin = (int(self._ends[place - 1]) if place else 0) + piece
        consumed = int((codes[:begin] & LENGTH_MASK).sum())
        if self._max_tokens is not None:
            codes = self._load(epoch=epoch, window=window, before=drawn - consumed)
        self._codes, self._done = codes, begin

    def refill(self) -> bool:
        """Go on to the next window; False where the source has ended."""
        if self._last:
            return False
        before = self._before + self._tokens
        epoch, window = self._epoch, self._window + 1
        if window * self.order.window >= self.order.size:
            epoch, window = epoch + 1, 0
        self._codes, self._done = self._load(epoch=epoch, window=window, before=before), 0
        return len(self._codes) > 0

    def place(self) -> tuple[int, int, int]:
        """Epoch, position and piece of what comes next, as for :meth:`seek`."""
        unit = int(np.searchsorted(self._ends, self._done, side="right"))
        piece = self._done - (int(self._ends[unit - 1]) if unit else 0)
        position = self._window * self.order.window + unit
        if position >= self.order.size:
            return self._epoch + 1, 0, 0
        return self._epoch, position, piece

    def _load(self, *, epoch: int, window: int, before: int | None) -> Ints:
        """The codes of a window, cut off at the end of the source; ``before`` tokens were drawn
        before it, None to leave ``max_tokens`` aside."""
        units = self.order.items(epoch=epoch, window=window)
        self._epoch, self._window, self._before = epoch, window, before or 0
        whole = len(units)
        if self._max_units is not None:
            left = self._max_units - epoch * self.order.size - window * self.order.window
            units = units[: max(0, left)]
        if self._max_tokens is not None and before is not None:
            drawn = before + np.cumsum(self.units.length[units])
            units = units[: int(np.searchsorted(drawn, self._max_tokens, side="right"))]
        self._last = len(units) < whole
        self._tokens = int(self.units.length[units].sum())
        pieces, first = self.units.pieces, self.units.first
        if pieces is None or first is None:
            items, self._ends = units, np.arange(1, len(units) + 1)
        else:
            counts = pieces[units]
            self._ends = np.cumsum(counts)
            starts = np.repeat(first[units] - (self._ends - counts), counts)
            items = starts + np.arange(len(starts))
        codes = ((items + self.number) << LENGTH_BITS) | self.units.piece_length[items]
        return codes | ROW if self.units.whole else codes
