"""What a model answered, as a reader sees it: thoughts, text and images in order.

A generated document is flat; its special tokens say what each stretch of text is::

    [BOG global thought EOG]  ( text | [BOC thought of the next image EOC] image )*  [ESS] EOS

Models break that form in every way there is, above all by running out of tokens in the middle of a
thought. Nothing they wrote is dropped: whatever stands in the wrong place is kept where it fits
best, and ``problems`` says what was wrong.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from emu35.tokens.document import Broken, Document, Image, Part, Special, Text
from emu35.tokens.vocabulary import Vocabulary

# The names of specials do not depend on the sizes of the tables.
_V = Vocabulary(n_text=1, codebook_size=1)
BOG, EOG, BOC, EOC, BSS, ESS, EOS = (
    _V.special_string(id) for id in (_V.bog, _V.eog, _V.boc, _V.eoc, _V.bss, _V.ess, _V.eos)
)
"""The strings of the specials that give an answer its form."""

_CLOSES = {BOG: EOG, BOC: EOC}
_WHAT = {BOG: "global chain of thought", BOC: "chain of thought of an image"}


@dataclass(frozen=True, slots=True)
class AnswerText:
    """A stretch of text, as generated: not stripped, never empty."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class AnswerImage:
    """An image as a grid of codes, [H, W], and what the model thought before drawing it."""

    codes_HW: NDArray[np.integer]
    thought: str | None = None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, AnswerImage)
            and self.thought == other.thought
            and np.array_equal(self.codes_HW, other.codes_HW)
        )


AnswerPart: TypeAlias = AnswerText | AnswerImage


@dataclass(slots=True)
class Answer:
    """An answer in reading order.

    ``thought`` is the global chain of thought, None where there is none. ``problems`` has one line
    for everything that is not as it should be. ``beyond`` is what was generated after the end of
    the answer: no part of it, and not lost.
    """

    thought: str | None
    parts: list[AnswerPart]
    problems: list[str] = field(default_factory=list[str])
    beyond: list[AnswerPart] = field(default_factory=list[AnswerPart])

    @property
    def text(self) -> str:
        """The texts of the answer, thoughts left out, stripped and with an empty line between."""
        texts = (part.text.strip() for part in self.parts if isinstance(part, AnswerText))
        return "\n\n".join(text for text in texts if text)

    @property
    def captions(self) -> list[str]:
        """The text before each image, stripped, and the one behind the last: one more than there
        are images. Thoughts are left out."""
        texts: list[list[str]] = [[]]
        for part in self.parts:
            if isinstance(part, AnswerText):
                texts[-1].append(part.text)
            else:
                texts.append([])
        return ["".join(words).strip() for words in texts]

    @property
    def images(self) -> list[AnswerImage]:
        """The images of the answer."""
        return [part for part in self.parts if isinstance(part, AnswerImage)]


def read_answer(document: Document) -> Answer:
    """The answer that ``document``, made of generated ids, holds.

    Where the form is broken: a thought that is not closed ends at the next image, thought or end;
    a second thought in the same place is joined to the first; the thought of an image that never
    came, or came broken, stands as text; marks that close nothing and specials that mean nothing
    in an answer are counted. Each is named in ``problems``. The ids of a ``Broken`` part stay in
    the document, its reason goes to ``problems``.
    """
    reader = _Reader()
    for part in document.parts:
        reader.read(part)
    return reader.finish()


class _Reader:
    """The answer so far, the thought that is open, and the thought that waits for its image."""

    def __init__(self) -> None:
        self._answer = Answer(thought=None, parts=[])
        self._strays: Counter[str] = Counter()
        self._open: str | None = None
        self._words: list[str] = []
        self._waiting: str | None = None
        self._ended = False

    def read(self, part: Part) -> None:
        if isinstance(part, Broken):
            self._broken(part)
        elif self._ended:
            self._after_the_end(part)
        elif isinstance(part, Text):
            self._text(part.text)
        elif isinstance(part, Image):
            self._image(part)
        else:
            self._special(part.token)

    def finish(self) -> Answer:
        self._end()
        for token, count in self._strays.items():
            times = f" ({count} times)" if count > 1 else ""
            self._problem(f"stray {token} in the answer{times}")
        if self._answer.beyond:
            images = sum(isinstance(part, AnswerImage) for part in self._answer.beyond)
            texts = len(self._answer.beyond) - images
            self._problem(f"after the end of the answer (texts: {texts}, images: {images})")
        return self._answer

    def _problem(self, text: str) -> None:
        self._answer.problems.append(text)

    def _text(self, text: str) -> None:
        if self._open is not None:
            self._words.append(text)
        elif text:
            self._answer.parts.append(AnswerText(text))
            if self._waiting is not None and text.strip():
                self._problem("text between an image and its chain of thought")

    def _image(self, image: Image) -> None:
        self._close(by=None)
        self._answer.parts.append(AnswerImage(image.codes_HW, thought=self._waiting))
        self._waiting = None

    def _broken(self, part: Broken) -> None:
        self._problem(part.reason)
        if self._open == BOC:
            self._close(by=None)
        # It may have been the image of this thought; the next one certainly is not.
        self._drop_waiting()

    def _special(self, token: str) -> None:
        if token in (ESS, EOS):
            self._end()
        elif token in _CLOSES:
            self._close(by=None)
            if token == BOG and any(_speaks(part) for part in self._answer.parts):
                self._problem("the global chain of thought is not at the beginning")
            self._open, self._words = token, []
        elif token in _CLOSES.values() and self._open is not None:
            self._close(by=token)
        else:
            self._strays[token] += 1

    def _close(self, *, by: str | None) -> None:
        """End the open thought, if any, by the mark ``by`` or for want of one."""
        if self._open is None:
            return
        kind, thought = self._open, "".join(self._words)
        self._open, self._words = None, []
        if by != _CLOSES[kind]:
            instead = f" but {by}" if by else ""
            self._problem(f"a {_WHAT[kind]} has no end {_CLOSES[kind]}{instead}")
        earlier = self._answer.thought if kind == BOG else self._waiting
        if earlier is not None:
            self._problem(f"a second {_WHAT[kind]} in the same place; joined to the first")
            thought = f"{earlier}\n\n{thought}"
        if kind == BOG:
            self._answer.thought = thought
        else:
            self._waiting = thought

    def _drop_waiting(self) -> None:
        """Let the thought that waits for an image stand as text."""
        if self._waiting is None:
            return
        self._problem("a chain of thought of an image, but no image; it stands as text")
        if self._waiting:
            self._answer.parts.append(AnswerText(self._waiting))
        self._waiting = None

    def _end(self) -> None:
        self._close(by=None)
        self._drop_waiting()
        self._ended = True

    def _after_the_end(self, part: Text | Image | Special) -> None:
        if isinstance(part, Image):
            self._answer.beyond.append(AnswerImage(part.codes_HW))
        elif isinstance(part, Text) and part.text:
            self._answer.beyond.append(AnswerText(part.text))


def _speaks(part: AnswerPart) -> bool:
    return isinstance(part, AnswerImage) or bool(part.text.strip())
