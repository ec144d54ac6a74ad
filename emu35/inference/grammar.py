"""Which token may come next: the decoding grammar of one sequence, a finite-state machine.

    TEXT --BOI--> HEADER --IMG--> ROW --w visual tokens--> ROW_END --EOL--> ROW ...
      ^                                                       |
      +---------------------------EOI-------------------------+

- TEXT: any id below the visual ones, except tokens that only mean something inside an image.
- HEADER: the grid size ``h*w``, forced where it is known, else digit by digit, then ``IMG``.
- ROW: any visual id. ROW_END: ``EOL``, or ``EOI`` behind the last row; both are forced.

So with n the 1-based index of a token after ``IMG``, n = h * (w + 1) is ``EOI``, any other multiple
of w + 1 is ``EOL``, and all the rest are visual: the rules and constants of the official decoder,
whose traces are reproduced row by row (tests/golden/pipeline.json). Two things go beyond it. An
image is begun, and a free size chosen, only where the whole image fits into the tokens that remain,
so every image is whole. And text holds no stray layout tokens, unless ``stray_layout`` asks for the
official legal set.

Every legal set is a few ranges of ids, which lets the engine project hidden states on those rows of
the vocabulary alone.
"""

from dataclasses import dataclass, field
from enum import Enum

from emu35.errors import DataError
from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary

MAX_DIGITS = 2
"""Digits of a free size on each side. Whatever a model wishes, a grid has at most 99 * 99 codes."""

UNLIMITED = 1 << 60


class State(Enum):
    """Where in a sequence the next token stands."""

    TEXT = "text"
    HEADER = "header"
    ROW = "row"
    ROW_END = "row end"


class NextKind(Enum):
    """What the next token is chosen from."""

    FORCED = "forced"  # exactly one id; nothing to sample
    AMONG = "among"  # a few ids: digits of a free grid size
    TEXT = "text"  # ids below the visual ones
    VISUAL = "visual"  # any visual id; the only place where guidance applies


@dataclass(frozen=True, kw_only=True, slots=True)
class Next:
    """The legal next tokens as half-open ranges of ids, ascending. FORCED has one id, AMONG a few,
    which ``ids`` lists."""

    kind: NextKind
    ranges: tuple[tuple[int, int], ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """Every legal id; meant for FORCED and AMONG."""
        return tuple(id for start, end in self.ranges for id in range(start, end))

    def __contains__(self, id: int) -> bool:
        return any(start <= id < end for start, end in self.ranges)


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
    two, models of small pictures need one. ``images`` False keeps to text. ``stray_layout``
    permits EOL, IMG and EOI in text, as the official decoder does.
    """

    size: GridSize | None = None
    same_size: bool = True
    open_image: bool = False
    min_digits: int = 2
    images: bool = True
    stray_layout: bool = False

    @property
    def smallest(self) -> GridSize:
        """The smallest image that may come."""
        side = 10 ** (self.min_digits - 1)
        return self.size or GridSize(height=side, width=side)


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

    def spell(self, text: str) -> list[int]:
        """The tokens of ``h*w`` or a part of it."""
        return [self.star if char == "*" else self.digits[int(char)] for char in text]

    def read(self, id: int) -> str:
        """The character of one of these ids."""
        return "*" if id == self.star else str(self.digits.index(id))


@dataclass(kw_only=True, slots=True)
class Grammar:
    """The state of one sequence. Ask :meth:`next`, choose a token, tell :meth:`accept`."""

    vocabulary: Vocabulary
    size_ids: SizeIds
    options: GrammarOptions = field(default_factory=GrammarOptions)
    state: State = field(default=State.TEXT, init=False)
    size: GridSize | None = field(init=False)
    images: int = field(default=0, init=False)
    """Whole images so far."""
    row: int = field(default=0, init=False)
    column: int = field(default=0, init=False)
    """Of the visual token to come, in the states ROW and ROW_END."""
    _typed: str = field(default="", init=False)  # of the size, since BOI
    _started: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.size = self.options.size
        assert 1 <= self.options.min_digits <= MAX_DIGITS

    def next(self, *, room: int = UNLIMITED) -> Next:
        """The legal next tokens if ``room`` more may come. Does not change the state."""
        match self.state:
            case State.TEXT:
                return self._next_in_text(room)
            case State.HEADER:
                return self._next_in_header(room)
            case State.ROW:
                visual = (self.vocabulary.visual_start, self.vocabulary.size)
                return Next(kind=NextKind.VISUAL, ranges=(visual,))
            case State.ROW_END:
                assert self.size is not None
                last = self.row == self.size.height - 1
                return _among(self.vocabulary.eoi if last else self.vocabulary.eol)

    def accept(self, token: int) -> bool:
        """Advance by ``token``. True when the unconditional stream is fed it too: that stream sees
        images, BOI to EOI, and never the generated text.

        Raises:
            DataError: ``token`` is not legal here.
        """
        if token not in self.next():
            raise DataError(
                f"token {token} is not legal in the state {self.state.value!r}; "
                f"legal ranges of ids: {list(self.next().ranges)}"
            )
        self._started = True
        vocabulary = self.vocabulary
        match self.state:
            case State.TEXT:
                if token == vocabulary.boi:
                    self.state, self._typed = State.HEADER, ""
                # A stray EOI, where it is permitted, is fed as well: the official decoder does so.
                return token in (vocabulary.boi, vocabulary.eoi)
            case State.HEADER:
                self._accept_in_header(token)
            case State.ROW:
                assert self.size is not None
                self.column += 1
                self.state = State.ROW if self.column < self.size.width else State.ROW_END
            case State.ROW_END:
                if token == vocabulary.eoi:
                    self._close()
                else:
                    self.state, self.row, self.column = State.ROW, self.row + 1, 0
        return True

    def _next_in_text(self, room: int) -> Next:
        vocabulary, options = self.vocabulary, self.options
        if options.open_image and not self._started:
            return _among(vocabulary.boi)
        smallest = self.size or options.smallest
        image = options.images and smallest.image_tokens <= room
        if options.stray_layout:
            text = ((0, vocabulary.boi), (vocabulary.eoi, vocabulary.visual_start))
            return Next(
                kind=NextKind.TEXT, ranges=((0, vocabulary.visual_start),) if image else text
            )
        ranges = ((0, vocabulary.eol), (vocabulary.eol + 1, vocabulary.img))
        if image:
            ranges += ((vocabulary.boi, vocabulary.boi + 1),)
        return Next(kind=NextKind.TEXT, ranges=ranges)

    def _next_in_header(self, room: int) -> Next:
        if self.size is not None:
            rest = str(self.size)[len(self._typed) :]
            return _among(self.size_ids.spell(rest[0])[0] if rest else self.vocabulary.img)
        # What a size may go on with: another digit if a whole image can still fit then, the star
        # or the end once there are digits enough.
        side = self._typed.rpartition("*")[2]
        legal: list[int] = []
        if len(side) < MAX_DIGITS:
            digits = "0123456789" if side else "123456789"
            fitting = [d for d in digits if self._fits(self._typed + d, room=room)]
            legal += self.size_ids.spell("".join(fitting))
        if len(side) >= self.options.min_digits:
            legal.append(self.vocabulary.img if "*" in self._typed else self.size_ids.star)
        return _among(*legal)

    def _fits(self, typed: str, *, room: int) -> bool:
        """Whether the smallest image whose size begins with ``typed`` fits into ``room``, which
        begins behind the characters typed so far."""
        height, _, width = typed.partition("*")
        shortest = self.options.min_digits
        size = GridSize(height=_smallest(height, shortest), width=_smallest(width, shortest))
        return size.image_tokens - 1 - len(self._typed) <= room

    def _accept_in_header(self, token: int) -> None:
        if token != self.vocabulary.img:
            self._typed += self.size_ids.read(token)
            return
        if self.size is None:
            height, width = self._typed.split("*")
            self.size = GridSize(height=int(height), width=int(width))
        self.state, self.row, self.column = State.ROW, 0, 0

    def _close(self) -> None:
        self.state, self.images = State.TEXT, self.images + 1
        if not self.options.same_size and self.options.size is None:
            self.size = None


def _smallest(typed: str, digits: int) -> int:
    """The smallest number of at least ``digits`` digits that begins with ``typed``."""
    return int((typed or "1").ljust(digits, "0"))


def _among(*ids: int) -> Next:
    return Next(
        kind=NextKind.FORCED if len(ids) == 1 else NextKind.AMONG,
        ranges=tuple((id, id + 1) for id in sorted(ids)),
    )
