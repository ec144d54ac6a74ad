"""Which token may come next: the decoding grammar of one sequence.

Outside an image every id below the visual ones is legal. ``BOI`` opens an image; then come the
grid size ``h*w``, ``IMG``, ``h`` rows of ``w`` visual tokens with ``EOL`` between them, ``EOI``.
With n the 1-based index of the token to come after ``IMG``: n = h * (w + 1) is ``EOI``, any other
multiple of w + 1 is ``EOL``, all the rest are visual tokens. Rules and constants are those of the
official decoder, so its traces are reproduced row by row (tests/golden/pipeline.json).
"""

from dataclasses import dataclass, field
from enum import Enum

from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary


class NextKind(Enum):
    """What the next token is chosen from."""

    FORCED = "forced"  # exactly one id; nothing to sample
    AMONG = "among"  # a few ids: digits of a free grid size
    TEXT = "text"  # any id below the visual ones
    VISUAL = "visual"  # any visual id; the only place where guidance applies


@dataclass(frozen=True, kw_only=True, slots=True)
class Next:
    """The legal next tokens; ``ids`` lists them for FORCED (one) and AMONG (several)."""

    kind: NextKind
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class GridSize:
    """Rows and columns of an image in codes."""

    height: int
    width: int

    @property
    def image_tokens(self) -> int:
        """Length of the whole image, BOI and EOI included, with one token a size character."""
        return self.height * (self.width + 1) + 2 + len(str(self))

    def __str__(self) -> str:
        return f"{self.height}*{self.width}"


@dataclass(frozen=True, kw_only=True, slots=True)
class GrammarOptions:
    """How much of an image the request fixes in advance.

    ``size`` forces the grid of every image (a wished ratio, or the last reference's size); None
    leaves the first one to the model. ``same_size`` then repeats the first image's size in those
    that follow. ``open_image`` forces ``BOI`` as the first token: pretraining documents carry no
    marker after the caption, so a prompt in that form cannot ask for a picture otherwise. A free
    size has between ``min_digits`` and two digits on each side; the official decoder insists on
    two, models of small pictures need one.
    """

    size: GridSize | None = None
    same_size: bool = True
    open_image: bool = False
    min_digits: int = 2


MAX_DIGITS = 2
"""Digits of a free size on each side. Whatever a model wishes, a grid has at most 99 * 99 codes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeIds:
    """The ids that spell a grid size. Both tokenizers give every digit a token of its own."""

    digits: tuple[int, ...]
    star: int

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> "SizeIds":
        """Read them from ``tokenizer``."""
        ids = tokenizer.encode("0123456789*")
        assert len(ids) == 11, "a grid size needs one token a character"
        return cls(digits=tuple(ids[:10]), star=ids[10])

    def spell(self, size: GridSize) -> list[int]:
        """The tokens of ``h*w``."""
        return [self.star if char == "*" else self.digits[int(char)] for char in str(size)]


@dataclass(kw_only=True, slots=True)
class Grammar:
    """The state of one sequence. Ask :meth:`next`, choose a token, tell :meth:`accept`."""

    vocabulary: Vocabulary
    size_ids: SizeIds
    options: GrammarOptions = field(default_factory=GrammarOptions)
    size: GridSize | None = field(init=False)
    in_image: bool = field(default=False, init=False)
    _typed: list[int] = field(default_factory=list[int], init=False)  # size tokens since BOI
    _row: int | None = field(default=None, init=False)  # of the token to come; None before IMG
    _column: int = field(default=0, init=False)
    _started: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.size = self.options.size
        assert 1 <= self.options.min_digits <= MAX_DIGITS

    def next(self) -> Next:
        """The legal next tokens. Does not change the state."""
        if not self.in_image:
            if self.options.open_image and not self._started:
                return _forced(self.vocabulary.boi)
            return TEXT
        if self._row is None:
            return self._next_of_size()
        assert self.size is not None
        if self._column < self.size.width:
            return VISUAL
        last = self._row == self.size.height - 1
        return _forced(self.vocabulary.eoi if last else self.vocabulary.eol)

    def accept(self, token: int) -> bool:
        """Advance by a legal ``token``. True when the unconditional stream is fed it too: that
        stream sees images, BOI to EOI, and never the generated text."""
        self._started = True
        if not self.in_image:
            if token == self.vocabulary.boi:
                self._open()
            # Text state permits a stray EOI, which the official decoder feeds as well.
            return token in (self.vocabulary.boi, self.vocabulary.eoi)
        if self._row is None:
            self._accept_size(token)
        elif token == self.vocabulary.eol:
            self._row, self._column = self._row + 1, 0
        elif token == self.vocabulary.eoi:
            self._close()
        else:
            self._column += 1
        return True

    def _open(self) -> None:
        self.in_image, self._typed, self._row, self._column = True, [], None, 0

    def _close(self) -> None:
        self.in_image, self._row = False, None
        if not self.options.same_size and self.options.size is None:
            self.size = None

    def _next_of_size(self) -> Next:
        if self.size is not None:
            spelled = self.size_ids.spell(self.size)
            at = len(self._typed)
            return _forced(spelled[at] if at < len(spelled) else self.vocabulary.img)
        ids = self.size_ids
        second = ids.star in self._typed
        digits = len(self._typed) - (self._typed.index(ids.star) + 1 if second else 0)
        legal: tuple[int, ...] = ()
        if digits < MAX_DIGITS:
            legal += ids.digits if digits else ids.digits[1:]
        if digits >= self.options.min_digits:
            legal += (self.vocabulary.img if second else ids.star,)
        return Next(kind=NextKind.AMONG if len(legal) > 1 else NextKind.FORCED, ids=legal)

    def _accept_size(self, token: int) -> None:
        if token != self.vocabulary.img:
            self._typed.append(token)
            return
        if self.size is None:
            ids = self.size_ids
            text = "".join("*" if t == ids.star else str(ids.digits.index(t)) for t in self._typed)
            height, width = text.split("*")
            self.size = GridSize(height=int(height), width=int(width))
        self._row = 0


TEXT = Next(kind=NextKind.TEXT)
VISUAL = Next(kind=NextKind.VISUAL)


def _forced(token: int) -> Next:
    return Next(kind=NextKind.FORCED, ids=(token,))
