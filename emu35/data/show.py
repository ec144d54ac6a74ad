"""Documents as people read them: text with specials written out, and pictures, in order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emu35.data.shards import Codes
from emu35.data.source import Source
from emu35.errors import DataError
from emu35.tokens.document import Broken, Image, Part, Special, Text
from emu35.tokens.serialize import split_parts
from emu35.tokens.text import TextTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownDocument:
    """A document of a source, or the token range [start, end) of one, decoded.

    Attributes:
        number: of the document in its source; ``length`` are its tokens.
        shard, member: the file, and what the names of its members in that tar begin with.
        modality: uint8 [end - start], :class:`~emu35.tokens.serialize.Modality` of each token.
        parts: text, specials, pictures, and what is no whole picture, in order.
        extra: what else was written with the document, besides its id, source and pictures.
    """

    id: str
    number: int
    source: str
    shard: str
    member: str
    length: int
    start: int
    end: int
    modality: Codes
    parts: Sequence[Part]
    extra: dict[str, Any]

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def images(self) -> list[Image]:
        return [part for part in self.parts if isinstance(part, Image)]

    def text(self) -> str:
        """One string, pictures as ``[image 6x6]``."""
        return "".join(map(_words, self.parts))


_KNOWN = ("id", "source", "tokens", "images")


def _words(part: Part) -> str:
    match part:
        case Text():
            return part.text
        case Special():
            return part.token
        case Image():
            rows, columns = np.shape(part.codes_HW)
            return f"[image {rows}x{columns}]"
        case Broken():
            return f"[{part.reason}, {len(part.ids)} tokens]"


def show_document(
    source: Source,
    *,
    number: int,
    tokenizer: TextTokenizer,
    start: int = 0,
    end: int | None = None,
) -> ShownDocument:
    """Decode document ``number``, or its tokens [start, end).

    Raises:
        DataError: if the document is damaged.
        TokenizerError: if it holds an id outside the vocabulary.
    """
    record = source.record(number)
    index, _ = source.locate(number)
    ids, modality = source.words(number)[0], source.codes(number)
    end = len(ids) if end is None else end
    return ShownDocument(
        id=str(record["id"]),
        number=number,
        source=source.name,
        shard=index.path.name,
        member=source.member(number),
        length=len(ids),
        start=start,
        end=end,
        modality=modality[start:end],
        parts=split_parts(ids[start:end].tolist(), tokenizer),
        extra={key: value for key, value in record.items() if key not in _KNOWN},
    )


def show_documents(
    source: Source, *, tokenizer: TextTokenizer, numbers: Sequence[int]
) -> Iterator[ShownDocument]:
    """Decode the documents ``numbers`` of ``source``.

    Raises:
        DataError: as :func:`show_document`.
    """
    for number in numbers:
        yield show_document(source, number=number, tokenizer=tokenizer)


def numbers_from(source: Source, *, first: int, count: int) -> list[int]:
    """Up to ``count`` document numbers from ``first`` on.

    Raises:
        DataError: if there is no document ``first``.
    """
    if not 0 <= first < len(source):
        raise DataError(
            f"{source.path} has no document {first}; it has {len(source)}, counted from 0"
        )
    return list(range(first, min(first + count, len(source))))


def random_numbers(source: Source, *, count: int, seed: int) -> list[int]:
    """Up to ``count`` different document numbers, ascending; the same for the same ``seed``."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(source), size=min(count, len(source)), replace=False)
    return sorted(chosen.tolist())
