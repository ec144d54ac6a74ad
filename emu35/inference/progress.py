"""What has happened, as it happens: the tokens of one request as events.

Whoever shows an answer while it comes (a terminal, a web page) feeds each
:class:`~emu35.inference.request.Update` and gets text that can be printed as it stands, pictures
that begin, grow and end, and thoughts told apart from the answer. All events of a sequence together
are its document: their text is the text, and their images are the images, that
:func:`~emu35.tokens.serialize.deserialize` finds in the same ids; what is a thought is what
:func:`~emu35.tokens.answer.read_answer` takes for one.

A character may be split over tokens, so bytes are held back until they make one; what can no longer
become a character is shown as U+FFFD, exactly where the document has it.
"""

import codecs
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from emu35.inference.grammar import GridSize
from emu35.inference.request import Token
from emu35.tokens.document import Broken, Image
from emu35.tokens.serialize import GRID_SIZE, STRAY, split_parts
from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class TextPiece:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtPiece:
    """More of a chain of thought: that of the next image, or of the whole answer."""

    text: str
    image: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBegun:
    """Image ``number`` (from 0, in the order of the document's images) has chosen its grid."""

    number: int
    size: GridSize


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageProgress:
    """A row is complete, and not the last one; ``codes_HW`` are the [rows_done, W] so far: a view
    of an array that is filled further, behind the rows of the view, which stay as they are. Only
    read it."""

    number: int
    rows_done: int
    rows: int
    codes_HW: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageDone:
    """The whole image, in an array of its own."""

    number: int
    codes_HW: NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is neither text nor an image, as ``Document.problems`` words it: an image
    that was cut off, layout tokens in text."""

    reason: str


@dataclass(frozen=True, slots=True)
class End:
    """Nothing comes any more."""


_FIRST_ROWS = 128
"""Rows that an image has room for at first: as many as most have at all."""

Event: TypeAlias = TextPiece | ThoughtPiece | ImageBegun | ImageProgress | ImageDone | Problem | End


class _Thought(Enum):
    """Which chain of thought is open."""

    none = "none"
    whole = "whole"
    image = "image"


class _Kind(Enum):
    """What an id is for splitting, as :mod:`emu35.tokens.serialize` has it."""

    text = "text"
    inside = "inside"
    boi = "boi"
    control = "control"


def _kind(id: int, *, vocabulary: Vocabulary) -> _Kind:
    if id < vocabulary.n_text:
        return _Kind.text
    if id == vocabulary.boi:
        return _Kind.boi
    if id >= vocabulary.visual_start or id in (vocabulary.img, vocabulary.eol, vocabulary.eoi):
        return _Kind.inside
    return _Kind.control


class Progress:
    """Feed it one request's tokens in order; each token belongs to one call."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = tokenizer.vocabulary
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._thought = _Thought.none
        self._answered = False  # ESS or EOS has come: no thought begins any more
        self._stray = False  # in a run of layout tokens outside an image
        self._image: _OpenImage | None = None
        self._images = 0
        self._ended = False
        self._events: list[Event] = []

    def feed(self, tokens: Iterable[Token]) -> list[Event]:
        """What ``tokens`` made happen."""
        return self.feed_ids(token.id for token in tokens)

    def feed_ids(self, ids: Iterable[int]) -> list[Event]:
        """The same for plain ids.

        Raises:
            TokenizerError: if an id lies outside the vocabulary.
        """
        assert not self._ended, "the sequence has ended"
        for id in ids:
            self._vocabulary.check(id)
            self._take(id)
        return self._handed_over()

    def finish(self) -> list[Event]:
        """What the end of the tokens makes of those held back, and :class:`End`."""
        assert not self._ended, "the sequence has ended"
        self._ended = True
        self._close_image()
        self._flush()
        self._events.append(End())
        return self._handed_over()

    def _handed_over(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _take(self, id: int) -> None:
        kind = _kind(id, vocabulary=self._vocabulary)
        if self._image is not None:
            if kind in (_Kind.text, _Kind.inside):
                self._extend_image(id)
                return
            self._close_image()
        if kind is _Kind.text:
            self._stray = False
            self._say(self._bytes.decode(self._tokenizer.decode_bytes((id,))))
            return
        self._flush()
        if kind is _Kind.inside:
            if not self._stray:
                self._broken(STRAY)
            self._stray = True
            return
        self._stray = False
        if kind is _Kind.boi:
            self._image = _OpenImage(ids=[id])
        elif not self._answered:
            self._thought = self._thought_after(id)

    def _thought_after(self, id: int) -> _Thought:
        vocabulary = self._vocabulary
        if id == vocabulary.bog:
            return _Thought.whole
        if id == vocabulary.boc:
            return _Thought.image
        self._answered = id in (vocabulary.ess, vocabulary.eos)
        ends = id in (vocabulary.eog, vocabulary.eoc) or self._answered
        return _Thought.none if ends else self._thought

    def _broken(self, reason: str) -> None:
        """Where an image should be there is none: the thought before it was about this one."""
        self._events.append(Problem(reason))
        if self._thought is _Thought.image:
            self._thought = _Thought.none

    def _extend_image(self, id: int) -> None:
        image, vocabulary = self._image, self._vocabulary
        assert image is not None
        image.ids.append(id)
        if id == vocabulary.eoi:
            self._close_image()
        elif id == vocabulary.img and image.size is None:
            image.size = self._read_size(image.ids[1:-1])
            image.row_start = len(image.ids)
            if image.size is not None:
                self._events.append(ImageBegun(number=self._images, size=image.size))
        elif id == vocabulary.eol and image.size is not None:
            self._end_row(image, size=image.size)

    def _read_size(self, ids: list[int]) -> GridSize | None:
        match = GRID_SIZE.fullmatch(self._tokenizer.decode(ids))
        return GridSize(height=int(match[1]), width=int(match[2])) if match else None

    def _end_row(self, image: "_OpenImage", *, size: GridSize) -> None:
        row_W = np.array(image.ids[image.row_start : -1], dtype=np.int64)
        image.row_start = len(image.ids)
        # A row that does not fit spoils the image: it ends as a problem, and until then stands
        # still.
        fits = len(row_W) == size.width and bool((row_W >= self._vocabulary.visual_start).all())
        if not fits or image.rows >= size.height:
            image.size = None
            return
        image.add_row(row_W - self._vocabulary.visual_start, height=size.height)
        self._events.append(
            ImageProgress(
                number=self._images,
                rows_done=image.rows,
                rows=size.height,
                codes_HW=image.codes_HW,
            )
        )

    def _close_image(self) -> None:
        if self._image is None:
            return
        ids, self._image = self._image.ids, None
        (part,) = split_parts(ids, self._tokenizer)
        if isinstance(part, Image):
            self._events.append(ImageDone(number=self._images, codes_HW=part.codes_HW))
            self._images += 1
            self._thought = _Thought.none
        else:
            assert isinstance(part, Broken)
            self._broken(part.reason)

    def _flush(self) -> None:
        """The run of text is over: what was held back becomes no character any more."""
        self._say(self._bytes.decode(b"", final=True))
        self._bytes.reset()

    def _say(self, text: str) -> None:
        """Add ``text``, to the event before it where that is of the same kind."""
        if not text:
            return
        last = self._events[-1] if self._events else None
        if self._thought is _Thought.none:
            if isinstance(last, TextPiece):
                self._events.pop()
                text = last.text + text
            self._events.append(TextPiece(text))
            return
        image = self._thought is _Thought.image
        if isinstance(last, ThoughtPiece) and last.image == image:
            self._events.pop()
            text = last.text + text
        self._events.append(ThoughtPiece(text=text, image=image))


@dataclass(kw_only=True, slots=True)
class _OpenImage:
    """An image of which BOI has come; ``size`` is None before IMG, and where rows do not fit.
    ``rows`` of its codes are there."""

    ids: list[int]
    size: GridSize | None = None
    row_start: int = 0
    rows: int = 0
    filled_HW: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 0), np.int64))

    @property
    def codes_HW(self) -> NDArray[np.int64]:
        """The codes [rows, W] so far, as a view."""
        return self.filled_HW[: self.rows]

    def add_row(self, row_W: NDArray[np.int64], *, height: int) -> None:
        """Add a row to an image of ``height`` rows.

        The size is what the ids say, and it may promise far more rows than will ever come: room is
        made for as many as there are, twice over, so that all of them cost what the last array has.
        """
        if self.rows == len(self.filled_HW):
            room = min(height, max(_FIRST_ROWS, 2 * self.rows))
            grown_HW = np.empty((room, len(row_W)), dtype=np.int64)
            if self.rows:
                grown_HW[: self.rows] = self.filled_HW
            self.filled_HW = grown_HW
        self.filled_HW[self.rows] = row_W
        self.rows += 1
