"""The documents of a source, cut into items that fit a row."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emu35.config.data import Overlong
from emu35.data.pack import StoredRows
from emu35.data.row_settings import CONFIG, RowSettings
from emu35.data.source import Source
from emu35.data.split import PictureTooLong, cut_points
from emu35.errors import DataError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class TooLong:
    """Documents longer than a row: how many ``of`` how many, the longest (tokens), and the number
    of the first."""

    documents: int
    of: int
    longest: int
    first: int
    settings: RowSettings = CONFIG

    def describe(self, *, source: Source, limit: int) -> str:
        """The beginning of a sentence about them."""
        return (
            f"source {source.name!r} ({source.path}): {self.documents} of {self.of} documents are "
            f"longer than {self.settings.length_is(limit)}; the longest has {self.longest} tokens, "
            f"the first is {source.describe(self.first)}"
        )


class Items:
    """The pieces that a source's documents become for rows of ``limit`` tokens. N items.

    Attributes:
        document, start, length: [N] the document, and the token range within it.
        per_shard: [shards] items in each shard.
        dropped: the documents that were left out for their length, None without any.
        rows: those that the items lie packed in, None where they do not
            (:class:`~emu35.data.packed_items.PackedItems`).
    """

    rows: StoredRows | None = None

    def __init__(
        self,
        *,
        source: Source,
        limit: int,
        documents: npt.NDArray[np.bool_] | None = None,
        overlong: Overlong = Overlong.cut,
        settings: RowSettings = CONFIG,
    ) -> None:
        """``documents`` [N] limits the items to those documents, ``overlong`` says what becomes of
        those that are longer than ``limit``.

        Raises:
            DataError: if there are any and ``overlong`` refuses them, or cuts them and a picture
                alone exceeds ``limit``; naming how many documents and the first.
        """
        keep = np.ones(len(source), bool) if documents is None else documents
        self.dropped: TooLong | None = None
        if overlong is not Overlong.cut:
            self.dropped = _too_long(source, keep=keep, limit=limit, settings=settings)
            keep = keep & (source.length <= limit)
        if self.dropped is not None and overlong is Overlong.refuse:
            raise DataError(
                f"{self.dropped.describe(source=source, limit=limit)}. Raise {settings.length} "
                f"to at least {self.dropped.longest}, or leave them out with "
                f"{settings.overlong_is(Overlong.drop)}"
            )
        counts = keep.astype(np.int64)
        cuts: dict[int, list[int]] = {}
        refused: list[tuple[int, int]] = []
        for document in np.flatnonzero(keep & (source.length > limit)).tolist():
            length = int(source.length[document])
            try:
                cuts[document] = cut_points(
                    length=length, spans=source.spans(document), limit=limit
                )
                counts[document] = len(cuts[document])
            except PictureTooLong as error:
                refused.append((document, error.length))
        if refused:
            first, length = refused[0]
            raise DataError(
                f"source {source.name!r} ({source.path}) has {len(refused)} documents with a "
                f"picture longer than {settings.length_is(limit)}; the first is "
                f"{source.describe(first)} with a picture of {length} tokens. Raise "
                f"{settings.length} to at least {length}, or ingest again with a smaller area"
            )
        self.document: Ints = np.repeat(np.arange(len(source)), counts)
        self.start: Ints = np.zeros(len(self.document), np.int64)
        self.length: Ints = source.length[self.document].copy()
        first_item = np.cumsum(counts) - counts
        for document, starts in cuts.items():
            begin = int(first_item[document])
            ends = [*starts[1:], int(source.length[document])]
            self.start[begin : begin + len(starts)] = starts
            self.length[begin : begin + len(starts)] = np.array(ends) - np.array(starts)
        shard = source.shard[self.document]
        self.per_shard: Ints = np.bincount(shard, minlength=len(source.shards)).astype(np.int64)

    def __len__(self) -> int:
        return len(self.document)


def _too_long(
    source: Source, *, keep: npt.NDArray[np.bool_], limit: int, settings: RowSettings
) -> TooLong | None:
    documents = np.flatnonzero(keep & (source.length > limit))
    if not len(documents):
        return None
    return TooLong(
        documents=len(documents),
        of=int(keep.sum()),
        longest=int(source.length[documents].max()),
        first=int(documents[0]),
        settings=settings,
    )
