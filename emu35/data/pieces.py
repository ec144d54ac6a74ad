"""The pieces of a packed row, as its JSON member has them and as an index does.

In ``KEY.json`` of a packed shard, ``"pieces"`` lists from left to right, for each::

    {"id", "source", "start", "tokens", "first", "of"}

the document it is of and that document's source, its first token in the row and how many it has,
the token of the document that it begins with, and how many the whole document has. What a
document's own JSON held besides goes with each of its pieces.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A document, or a part of it, in a packed row.

    Attributes:
        id, source: of the document, as it was ingested.
        start, tokens: its range in the row.
        first: the token of the document that it begins with.
        of: tokens of the whole document.
    """

    id: str
    source: str
    start: int
    tokens: int
    first: int
    of: int

    @property
    def is_whole(self) -> bool:
        return self.tokens == self.of


def read_pieces(facts: Mapping[str, Any]) -> list[Piece]:
    """The pieces in the JSON member of a row, from left to right.

    Raises:
        LookupError, TypeError or ValueError: the member is not that of a packed row.
    """
    pieces = [
        Piece(
            id=str(entry["id"]),
            source=str(entry["source"]),
            start=int(entry["start"]),
            tokens=int(entry["tokens"]),
            first=int(entry["first"]),
            of=int(entry["of"]),
        )
        for entry in facts["pieces"]
    ]
    end = 0
    for piece in pieces:
        if piece.start != end or piece.tokens < 1:
            raise ValueError(
                f"piece {piece.id!r} of row {facts['id']!r} has tokens {piece.start} to "
                f"{piece.start + piece.tokens}, but the next is {end}"
            )
        end += piece.tokens
    if end != facts["tokens"]:
        raise ValueError(
            f"the pieces of row {facts['id']!r} have {end} of its {facts['tokens']} tokens"
        )
    return pieces


def piece_table(facts: Mapping[str, Any]) -> list[list[int]]:
    """[P, 3] what an index keeps of the pieces of a row: start, first, of.

    Raises:
        LookupError, TypeError or ValueError: as :func:`read_pieces`.
    """
    return [[piece.start, piece.first, piece.of] for piece in read_pieces(facts)]


def piece_lengths(*, piece_row: Ints, pieces: Ints, length: Ints) -> Ints:
    """[P] tokens of each piece of rows with ``length`` [N] tokens."""
    ends = np.append(pieces[1:, 0], 0)
    ends[piece_row[1:] - 1] = length
    return ends - pieces[:, 0]


def check_pieces(*, piece_row: Ints, pieces: Ints, length: Ints) -> None:
    """Whether the pieces of an index cover its rows.

    Raises:
        ValueError: they do not.
    """
    if piece_row.shape != (len(length) + 1,) or pieces.ndim != 2 or pieces.shape[1] != 3:
        raise ValueError(f"pieces {pieces.shape} of rows {piece_row.shape} have another shape")
    counts = np.diff(piece_row)
    if piece_row[0] != 0 or piece_row[-1] != len(pieces) or bool(np.any(counts < 1)):
        raise ValueError("rows do not share all pieces between them")
    tokens = piece_lengths(piece_row=piece_row, pieces=pieces, length=length)
    first, of = pieces[:, 1], pieces[:, 2]
    if (
        bool(np.any(pieces[piece_row[:-1], 0] != 0))
        or bool(np.any(tokens < 1))
        or bool(np.any(first < 0))
        or bool(np.any(first > of - tokens))
    ):
        raise ValueError("pieces do not cover their rows")
