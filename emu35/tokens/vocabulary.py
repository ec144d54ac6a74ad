"""Where every id lies: text, then 211 specials, then the visual codes.

The special strings and their order are those of the Emu3.5 release; the ids follow from two
numbers, the size of the text table and the size of the image codebook.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from emu35.config.tokenizer import TokenizerConfig, TokenizerKind
from emu35.errors import TokenizerError

N_TEXT = {TokenizerKind.emu35: 151_643, TokenizerKind.bytes: 256}
"""Text ids of each kind of tokenizer."""

EXTRA_TOKENS = 205
LARGEST_CODEBOOK = 1_000_000
"""Visual tokens are written with six digits."""

_FIRST_EXTRA = 3
_FIRST_LAYOUT = _FIRST_EXTRA + EXTRA_TOKENS
_FIRST_VISUAL = _FIRST_LAYOUT + 3

SPECIAL_PATTERN = re.compile(
    r"<\|(?:visual token [0-9]{6}|image (?:start|end|token)|extra_[0-9]{1,3}"
    r"|im_start|im_end|endoftext)\|>"
)
"""Matches every special string, and a few that are none: look matches up with ``special_id``."""

_VISUAL_STRING = re.compile(r"<\|visual token ([0-9]{6})\|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Ids of a text table of ``n_text`` entries followed by ``codebook_size`` visual codes.

    Raises:
        TokenizerError: if either number is impossible.
    """

    n_text: int
    codebook_size: int

    def __post_init__(self) -> None:
        if self.n_text < 1:
            raise TokenizerError(f"n_text={self.n_text}: a vocabulary needs at least one text id")
        if not 1 <= self.codebook_size <= LARGEST_CODEBOOK:
            raise TokenizerError(
                f"codebook_size={self.codebook_size} must lie in 1..{LARGEST_CODEBOOK}; "
                "visual tokens are named with six digits"
            )

    @property
    def pad(self) -> int:
        return self.n_text

    @property
    def im_start(self) -> int:
        return self.n_text + 1

    @property
    def im_end(self) -> int:
        return self.n_text + 2

    def extra(self, i: int) -> int:
        """Id of ``<|extra_i|>``, 0 <= i < 205."""
        if not 0 <= i < EXTRA_TOKENS:
            raise TokenizerError(f"extra_{i} does not exist; extras run from 0 to 204")
        return self.n_text + _FIRST_EXTRA + i

    @property
    def bos(self) -> int:
        """Begin of document."""
        return self.extra(203)

    @property
    def eos(self) -> int:
        """End of document."""
        return self.extra(204)

    @property
    def eol(self) -> int:
        """End of an image row (none after the last row)."""
        return self.extra(200)

    @property
    def eof(self) -> int:
        """End of a video frame; the release defines it and never uses it."""
        return self.extra(201)

    @property
    def tms(self) -> int:
        """Time stamp; the release defines it and never uses it."""
        return self.extra(202)

    @property
    def bss(self) -> int:
        """Begin of the assistant's turn."""
        return self.extra(100)

    @property
    def ess(self) -> int:
        """End of the assistant's turn."""
        return self.extra(101)

    @property
    def bog(self) -> int:
        """Begin of the global chain of thought."""
        return self.extra(60)

    @property
    def eog(self) -> int:
        """End of the global chain of thought."""
        return self.extra(61)

    @property
    def boc(self) -> int:
        """Begin of an image's chain of thought."""
        return self.extra(50)

    @property
    def eoc(self) -> int:
        """End of an image's chain of thought."""
        return self.extra(51)

    @property
    def img(self) -> int:
        """Between an image's size and its first row."""
        return self.n_text + _FIRST_LAYOUT

    @property
    def boi(self) -> int:
        """Begin of image."""
        return self.n_text + _FIRST_LAYOUT + 1

    @property
    def eoi(self) -> int:
        """End of image."""
        return self.n_text + _FIRST_LAYOUT + 2

    @property
    def visual_start(self) -> int:
        """Id of visual code 0."""
        return self.n_text + _FIRST_VISUAL

    @property
    def size(self) -> int:
        """Number of ids; the model's embedding has exactly this many rows."""
        return self.visual_start + self.codebook_size

    def check(self, id: int) -> None:
        """Raise TokenizerError unless ``id`` is one of the vocabulary's."""
        if not 0 <= id < self.size:
            raise TokenizerError(
                f"id {id} lies outside the vocabulary of {self.size} ids (0..{self.size - 1}); "
                "were the ids made with another tokenizer or codebook?"
            )

    def is_visual(self, id: int) -> bool:
        """Whether ``id`` stands for a visual code."""
        return self.visual_start <= id < self.size

    def visual(self, code: int) -> int:
        """Id of visual ``code``."""
        if not 0 <= code < self.codebook_size:
            raise TokenizerError(f"visual code {code} must lie in 0..{self.codebook_size - 1}")
        return self.visual_start + code

    def code(self, id: int) -> int:
        """Visual code of ``id``."""
        if not self.is_visual(id):
            raise TokenizerError(
                f"id {id} is no visual token; those are {self.visual_start}..{self.size - 1}"
            )
        return id - self.visual_start

    def special_strings(self) -> dict[str, int]:
        """The 211 special strings that are not visual tokens, in the order of their ids."""
        return {text: self.n_text + offset for offset, text in enumerate(_special_names())}

    def visual_string(self, code: int) -> str:
        """How the official tokenizer writes visual ``code``."""
        return f"<|visual token {self.visual(code) - self.visual_start:06d}|>"

    def special_id(self, text: str) -> int | None:
        """Id of a special string, visual tokens included; None if ``text`` is not one."""
        if match := _VISUAL_STRING.fullmatch(text):
            code = int(match[1])
            return self.visual_start + code if code < self.codebook_size else None
        offset = _OFFSETS.get(text)
        return None if offset is None else self.n_text + offset

    def special_string(self, id: int) -> str:
        """The string of a special or visual ``id``, as the official tokenizer writes it."""
        if self.is_visual(id):
            return self.visual_string(id - self.visual_start)
        if not self.n_text <= id < self.visual_start:
            raise TokenizerError(
                f"id {id} is no special token; those are {self.n_text}..{self.size - 1}"
            )
        return _NAMES[id - self.n_text]


def vocabulary_of(config: TokenizerConfig) -> Vocabulary:
    """The vocabulary a tokenizer section describes. Reads no file, so planning may call it."""
    return Vocabulary(n_text=N_TEXT[config.kind], codebook_size=config.codebook_size)


def _special_names() -> Iterator[str]:
    yield from ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    for i in range(EXTRA_TOKENS):
        yield f"<|extra_{i}|>"
    yield from ("<|image token|>", "<|image start|>", "<|image end|>")


_NAMES = tuple(_special_names())
_OFFSETS = {name: offset for offset, name in enumerate(_NAMES)}
