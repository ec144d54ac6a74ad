"""A document as one stream of ids, and a stream of ids as a document.

An image of h x w codes is written row by row, its size first, in the text tokenizer's own digits::

    BOI h*w IMG  row_0 EOL row_1 EOL ... row_{h-1}  EOI        (no EOL after the last row)

A document for pretraining is ``BOS parts EOS``. Parts that follow each other as text are one text:
they are joined before encoding, so that ``serialize(deserialize(ids))`` gives ``ids`` back.

Special ids cannot come from text, hence what a token *is* follows from the ids alone
(:func:`modality_of`); shards store it all the same, so that training needs no grammar.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emu35.errors import DataError
from emu35.tokens.document import Broken, Document, Image, Part, Special, Text, check_grid
from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary

GRID_SIZE = re.compile(r"([1-9][0-9]{0,5})\*([1-9][0-9]{0,5})")
"""How an image's size is spelled: height, then width."""

STRAY = "image tokens outside an image"
"""The reason of a ``Broken`` part that does not begin with BOI."""


class Modality(IntEnum):
    """What a token is; the loss weighs labels by it."""

    TEXT = 0
    VISUAL = 1
    LAYOUT = 2
    """BOI, the size's digits and ``*``, IMG, EOL, EOI."""
    CONTROL = 3
    """BOS, EOS and every other special."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """A document's ids (uint32 [N]) and the :class:`Modality` of each (uint8 [N])."""

    tokens: NDArray[np.uint32]
    modality: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.tokens)


def image_tokens(codes_HW: ArrayLike, tokenizer: TextTokenizer) -> list[int]:
    """Ids of an image, BOI to EOI: h*w + (h-1) + 3 + len("h*w") of them.

    Raises:
        DataError: if the grid is empty, ragged or not of integers, or a code lies outside the
            codebook.
    """
    vocabulary = tokenizer.vocabulary
    codes = _grid(codes_HW)
    lowest, highest = int(codes.min()), int(codes.max())
    if lowest < 0 or highest >= vocabulary.codebook_size:
        wrong = lowest if lowest < 0 else highest
        raise DataError(
            f"code {wrong} lies outside the codebook of {vocabulary.codebook_size} entries; "
            "was the image encoded with another image tokenizer?"
        )
    height, width = codes.shape
    rows = np.full((height, width + 1), vocabulary.eol, dtype=np.int64)
    rows[:, :width] = codes + vocabulary.visual_start
    size = tokenizer.encode(f"{height}*{width}")
    body: list[int] = rows.ravel()[:-1].tolist()
    return [vocabulary.boi, *size, vocabulary.img, *body, vocabulary.eoi]


def serialize(document: Document, tokenizer: TextTokenizer) -> TokenSequence:
    """The pretraining form of ``document``: BOS, its parts, EOS.

    Raises:
        DataError: if a part is broken or an image's codes do not fit the codebook; the message
            names the document.
    """
    vocabulary = tokenizer.vocabulary
    if document.problems:
        raise DataError(
            f"document {document.id!r} of source {document.source!r} contains a broken part: "
            f"{document.problems[0]}; drop the part or repair it before serializing"
        )
    try:
        ids = join_parts(document.parts, tokenizer)
    except DataError as error:
        raise DataError(
            f"document {document.id!r} of source {document.source!r}: {error}"
        ) from None
    tokens = np.array([vocabulary.bos, *ids, vocabulary.eos], dtype=np.uint32)
    return TokenSequence(tokens, modality_of(tokens, vocabulary=vocabulary))


def deserialize(ids: Iterable[int], tokenizer: TextTokenizer) -> Document:
    """The document of ``ids``; a leading BOS and a trailing EOS are dropped.

    Never refuses ids of the vocabulary: an image that is cut off, ragged, or of another size than
    it says becomes a ``Broken`` part with its ids and a reason (see ``Document.problems``).

    Raises:
        TokenizerError: if an id lies outside the vocabulary.
    """
    vocabulary = tokenizer.vocabulary
    stream = list(ids)
    if stream and stream[0] == vocabulary.bos:
        stream = stream[1:]
    if stream and stream[-1] == vocabulary.eos:
        stream = stream[:-1]
    return Document(split_parts(stream, tokenizer))


def join_parts(
    parts: Iterable[Part], tokenizer: TextTokenizer, *, allow_special: bool = False
) -> list[int]:
    """Ids of ``parts`` with nothing around them; a ``Broken`` part gives its ids back.

    ``allow_special`` parses special strings inside text: for text that we wrote ourselves.

    Raises:
        DataError: if codes or a special token do not belong to the vocabulary.
    """
    vocabulary = tokenizer.vocabulary
    ids: list[int] = []
    pending = ""
    for part in parts:
        if isinstance(part, Text):
            pending += part.text
            continue
        ids += tokenizer.encode(pending, allow_special=allow_special)
        pending = ""
        if isinstance(part, Image):
            ids += image_tokens(part.codes_HW, tokenizer)
        elif isinstance(part, Special):
            ids.append(_special_id(part.token, vocabulary=vocabulary))
        else:
            ids += _inside(part.ids, vocabulary=vocabulary)
    return ids + tokenizer.encode(pending, allow_special=allow_special)


def split_parts(ids: Iterable[int], tokenizer: TextTokenizer) -> list[Part]:
    """Parts of ``ids``, every special outside an image as a ``Special`` part.

    Raises:
        TokenizerError: if an id lies outside the vocabulary.
    """
    vocabulary = tokenizer.vocabulary
    stream = list(ids)
    marks = _marks(np.asarray(stream, dtype=np.int64), vocabulary=vocabulary)
    parts: list[Part] = []
    start = 0
    while start < len(stream):
        kind = marks.kinds[start]
        if kind == _CONTROL:
            parts.append(Special(tokenizer.decode(stream[start : start + 1])))
            start += 1
            continue
        end = marks.image_end(start) if kind == _BEGIN else marks.run_end(start)
        piece = stream[start:end]
        if kind == _BEGIN:
            parts.append(_read_image(piece, tokenizer))
        elif kind == _TEXT:
            parts.append(Text(tokenizer.decode(piece)))
        else:
            parts.append(Broken(tuple(piece), STRAY))
        start = end
    return parts


def modality_of(tokens: ArrayLike, *, vocabulary: Vocabulary) -> NDArray[np.uint8]:
    """The :class:`Modality` of each id, uint8 [N]; ids between BOI and IMG are the size."""
    ids = np.asarray(tokens).astype(np.int64)
    modality = np.full(ids.shape, Modality.TEXT, dtype=np.uint8)
    modality[ids >= vocabulary.n_text] = Modality.CONTROL
    modality[ids >= vocabulary.visual_start] = Modality.VISUAL
    modality[np.isin(ids, _layout_ids(vocabulary))] = Modality.LAYOUT
    # A size is open where the latest special was BOI.
    special = np.where(ids >= vocabulary.n_text, np.arange(len(ids)), -1)
    latest = np.maximum.accumulate(special) if len(ids) else special
    in_size = (latest >= 0) & (ids[latest] == vocabulary.boi) & (ids < vocabulary.n_text)
    modality[in_size] = Modality.LAYOUT
    return modality


_TEXT, _INSIDE, _END, _BEGIN, _CONTROL = range(5)


@dataclass(frozen=True, slots=True)
class _Marks:
    """What each id of a stream is for splitting, and where runs and images can stop."""

    kinds: NDArray[np.uint8]
    changes: NDArray[np.intp]
    stops: NDArray[np.intp]

    def run_end(self, start: int) -> int:
        """One past the run of text, or of stray image tokens, that begins at ``start``."""
        return self._first(self.changes, after=start)

    def image_end(self, start: int) -> int:
        """One past the EOI of the image at ``start``, or where it breaks off without one."""
        stop = self._first(self.stops, after=start)
        return stop + 1 if stop < len(self.kinds) and self.kinds[stop] == _END else stop

    def _first(self, places: NDArray[np.intp], *, after: int) -> int:
        index = int(np.searchsorted(places, after, side="right"))
        return int(places[index]) if index < len(places) else len(self.kinds)


def _marks(ids: NDArray[np.int64], *, vocabulary: Vocabulary) -> _Marks:
    outside = np.flatnonzero((ids < 0) | (ids >= vocabulary.size))
    if len(outside):
        vocabulary.check(int(ids[outside[0]]))
    kinds = np.full(ids.shape, _TEXT, dtype=np.uint8)
    kinds[ids >= vocabulary.n_text] = _CONTROL
    kinds[ids >= vocabulary.visual_start] = _INSIDE
    kinds[np.isin(ids, _layout_ids(vocabulary))] = _INSIDE
    kinds[ids == vocabulary.boi] = _BEGIN
    kinds[ids == vocabulary.eoi] = _END
    runs = np.where(kinds == _END, _INSIDE, kinds)
    return _Marks(
        kinds=kinds,
        changes=np.flatnonzero(runs[1:] != runs[:-1]) + 1,
        stops=np.flatnonzero(kinds >= _END),
    )


def _layout_ids(vocabulary: Vocabulary) -> list[int]:
    return [vocabulary.boi, vocabulary.img, vocabulary.eol, vocabulary.eoi]


def _read_image(ids: list[int], tokenizer: TextTokenizer) -> Image | Broken:
    """The image of ``ids``, which begin with BOI and hold no other BOI or control token."""
    vocabulary = tokenizer.vocabulary

    def broken(reason: str) -> Broken:
        return Broken(tuple(ids), reason)

    if ids[-1] != vocabulary.eoi:
        return broken("image without an end")
    if vocabulary.img not in ids:
        return broken("image without a size")
    begin = ids.index(vocabulary.img)
    match = GRID_SIZE.fullmatch(tokenizer.decode(ids[1:begin]))
    if match is None or tokenizer.encode(match[0]) != ids[1:begin]:
        return broken("image without a size")
    height, width = int(match[1]), int(match[2])
    body = np.array([*ids[begin + 1 : -1], vocabulary.eol], dtype=np.int64)
    if len(body) != height * (width + 1):
        return broken("image of another size than it says")
    rows = body.reshape(height, width + 1)
    codes = rows[:, :width] - vocabulary.visual_start
    if (rows[:, width] != vocabulary.eol).any() or (codes < 0).any():
        return broken("image with ragged rows")
    return Image(codes)


def _grid(codes_HW: ArrayLike) -> NDArray[np.int64]:
    try:
        codes = np.asarray(codes_HW)
    except ValueError:
        raise DataError("an image of codes has rows of different lengths") from None
    check_grid(codes)
    return codes.astype(np.int64)


def _special_id(token: str, *, vocabulary: Vocabulary) -> int:
    id = vocabulary.special_id(token)
    if id is None:
        raise DataError(
            f"{token!r} is no special token; the specials are <|endoftext|>, <|im_start|>, "
            "<|im_end|> and <|extra_0|> to <|extra_204|>"
        )
    if vocabulary.is_visual(id) or id in _layout_ids(vocabulary):
        raise DataError(f"{token!r} belongs to an image; give the image as codes")
    return id


def _inside(ids: Sequence[int], *, vocabulary: Vocabulary) -> Sequence[int]:
    for id in ids:
        vocabulary.check(id)
    return ids
