"""A micro-batch with noisy copies over several blocks of 128, laid out as for training."""

from collections.abc import Sequence

import torch
from dida_rows import VOCABULARY, picture, row

from emu35.data.batch import Batch
from emu35.dida.layout import NoisyCopies
from emu35.tokens.document import Part

COLUMNS, ROOM = 300, 170

Documents = Sequence[Sequence[str | Part]]


def copies_batch(*rows: Documents, columns: int = COLUMNS, room: int = ROOM) -> Batch:
    """A row of documents each, with copies of the pictures that fit."""
    parts = [row(documents, columns=columns) for documents in rows]
    batch = Batch(
        **{
            name: torch.cat([getattr(part, name) for part in parts])
            for name in (
                "tokens",
                "labels",
                "label_modality",
                "label_valid",
                "label_source",
                "positions",
                "document_start",
            )
        },
        sample_ids=list(range(len(parts))),
    )
    return NoisyCopies(vocabulary=VOCABULARY, room=room)(batch)


def two_rows() -> Batch:
    """Three documents and three copies, then two documents, of which one copy alone fits; padding
    in the rows and behind the copies of both."""
    first: Documents = [
        ["a story of", picture(5, 9, seed=1), "and then", picture(4, 7, seed=2), "the end"],
        ["nothing but words, and many of them"],
        ["one more", picture(6, 8, seed=3)],
    ]
    second: Documents = [
        ["large", picture(12, 12, seed=4), "larger", picture(8, 8, seed=5)],
        ["x"],
    ]
    return copies_batch(first, second)
