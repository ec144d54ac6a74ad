"""The pieces of a source that lies packed: nothing is cut or put together, only looked up."""

import numpy as np
import numpy.typing as npt

from emu35.config.data import Overlong
from emu35.data.items import Items, TooLong
from emu35.data.pack import StoredRows
from emu35.data.pieces import piece_lengths
from emu35.data.source import Source
from emu35.errors import DataError

Ints = npt.NDArray[np.int64]


class PackedItems(Items):
    """The pieces in the rows of a packed source, row after row. P items.

    ``document`` is the row that an item lies in, ``start`` where. What ``overlong`` asks for holds
    for the documents that were cut when they were packed: ``drop`` leaves all their pieces out,
    and rows are so much shorter.

    Attributes:
        rows: the rows, as far as something of them is left.
    """

    def __init__(
        self,
        *,
        source: Source,
        limit: int,
        max_pieces: int | None = None,
        overlong: Overlong = Overlong.cut,
    ) -> None:
        """The first ``max_pieces`` of the pieces, or all.

        Raises:
            DataError: if the rows have another length than ``limit``, or hold parts of documents
                and ``overlong`` refuses those.
        """
        if source.packed != limit:
            raise DataError(
                f"source {source.name!r} ({source.path}) was packed into rows of {source.packed} "
                f"tokens, but data.sequence_length={limit}; set "
                f"data.sequence_length={source.packed}, or pack its documents again with "
                f"`emu35 data pack --sequence-length {limit}`"
            )
        row, start, length, first, of = _all_pieces(source)
        keep = np.ones(len(row), bool)
        if max_pieces is not None:
            keep[max_pieces:] = False
        self.dropped = None
        if overlong is not Overlong.cut:
            self.dropped = _cut_documents(row, first, of, parts=keep & (length < of), among=keep)
            keep &= length == of
        if self.dropped is not None and overlong is Overlong.refuse:
            raise DataError(
                f"{self.dropped.describe(source=source, limit=limit)}, and they were cut when they "
                "were packed. Leave them out with data.overlong=drop, or pack again with longer "
                "rows"
            )
        self.document: Ints = row[keep]
        self.start: Ints = start[keep]
        self.length: Ints = length[keep]
        self.is_beginning = first[keep] == 0
        shards = len(source.shards)
        self.per_shard = np.bincount(source.shard[self.document], minlength=shards).astype(np.int64)
        counts = np.bincount(self.document, minlength=len(source)).astype(np.int64)
        used = counts > 0
        if used.any():
            self.rows = StoredRows(
                lengths=self.length,
                counts=counts[used],
                per_shard=np.bincount(source.shard[used], minlength=shards).astype(np.int64),
                capacity=limit,
            )


def _all_pieces(source: Source) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """[P] each: row, start and tokens of every piece; where it begins in its document, and how long
    that is."""
    counts = np.concatenate([np.diff(shard.piece_row) for shard in source.shards])
    length = np.concatenate(
        [
            piece_lengths(piece_row=shard.piece_row, pieces=shard.pieces, length=shard.length)
            for shard in source.shards
        ]
    )
    table = np.concatenate([shard.pieces for shard in source.shards])
    row = np.repeat(np.arange(len(source)), counts)
    return row, table[:, 0].copy(), length, table[:, 1].copy(), table[:, 2].copy()


def _cut_documents(
    row: Ints,
    first: Ints,
    of: Ints,
    *,
    parts: npt.NDArray[np.bool_],
    among: npt.NDArray[np.bool_],
) -> TooLong | None:
    if not parts.any():
        return None
    beginning = first == 0
    return TooLong(
        documents=max(1, int((parts & beginning).sum())),
        of=max(1, int((among & beginning).sum())),
        longest=int(of[parts].max()),
        first=int(row[np.flatnonzero(parts)[0]]),
    )
