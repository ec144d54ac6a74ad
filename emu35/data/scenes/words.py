"""Pictures of a word: letters in one colour on a plain background, for optical character
recognition to read back.

Words are all pairs of :data:`LETTERS`, so that a word that was never drawn in training is made of
letters that were. Half of them have pictures to train on; a model is not shown the others, but may
practise some of them, being told how well a reader reads its drawings (:class:`Words`).

Letters are large or small, and captions do not say which. Small ones are nearly always read as
they are drawn, and hardly ever after an image tokenizer of the demo's size (2 in 100 letters): what
a reader likes is something to find out.

Longer ones do not survive an image tokenizer of the demo's size: of words that were drawn at 64
pixels and decoded from 8 x 8 of 256 codes again, rapidocr reads three letters without a mistake
half of the time and four never. Of 200 pairs it reads 92 in 100 where the tokenizer never saw a
word, and 98 where 3,000 were among the pictures that it was trained on.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from emu35.data.scenes.captions import (
    ZH_BACKGROUND,
    ZH_COLON,
    ZH_COLOUR,
    ZH_STOP,
    Language,
)
from emu35.data.scenes.describe import (
    BACKGROUND_RGB,
    RGB,
    Background,
    Colour,
    Size,
    hashed_share,
)
from emu35.data.scenes.render import OVERSAMPLING

LETTERS = "AEKLPSTUXY"
"""Upper-case letters that no reader takes for another one or for a digit (as C and G, O and 0, I
and 1 are), and that are no finer than the demo's codes (as M and W are)."""

LENGTH = 2
"""Letters of a word."""

COLOUR = Colour.blue
"""Of letters, on a white background. A model of the demo's size learns every letter in every colour
on its own: in any colour on black or white there would be 130 sorts to learn, here there are 10."""

CELLS = {Size.large: (0.46, 0.6), Size.small: (0.28, 0.36)}
"""Largest width and height of a letter, as fractions of the picture's side. Letters stand in
columns of half the picture each, so that what a letter looks like does not depend on the other
one."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Word:
    """What is written, and how it looks."""

    text: str
    colour: Colour
    size: Size = Size.large
    background: Background = Background.white

    def to_json(self) -> dict[str, Any]:
        """Plain values, the form kept beside each picture."""
        return {
            "text": self.text,
            "colour": str(self.colour),
            "size": str(self.size),
            "background": str(self.background),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Word":
        """The inverse of :meth:`to_json`.

        Raises:
            KeyError, ValueError: ``value`` lacks a field or names an unknown attribute.
        """
        return Word(
            text=str(value["text"]),
            colour=Colour(value["colour"]),
            size=Size(value["size"]),
            background=Background(value["background"]),
        )


class Words(StrEnum):
    """What becomes of a word: drawn for training, practised without a picture, or held out."""

    pictured = "pictured"
    practised = "practised"
    held_out = "held_out"


SHARES = {Words.held_out: 0.15, Words.practised: 0.35, Words.pictured: 0.5}
"""Of all words."""


def word_use(text: str) -> Words:
    """Where ``text`` belongs: a hash of its letters."""
    place = hashed_share(f"word {text}")
    if place < SHARES[Words.held_out]:
        return Words.held_out
    practised = place < SHARES[Words.held_out] + SHARES[Words.practised]
    return Words.practised if practised else Words.pictured


def sample_word(rng: random.Random, *, use: Words) -> Word:
    """A random word for ``use``, large or small."""
    while word_use(text := "".join(rng.choices(LETTERS, k=LENGTH))) is not use:
        pass
    return Word(text=text, colour=COLOUR, size=rng.choice(list(CELLS)))


def render_word(word: Word, *, resolution: int = 96) -> Image.Image:
    """A square RGB picture, ``resolution`` pixels a side, with the letters of the word side by side
    at half its height, in the font that comes with Pillow."""
    side = resolution * OVERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUND_RGB[word.background])
    draw, font = ImageDraw.Draw(image), _font(side, size=word.size)
    for number, letter in enumerate(word.text):
        left, top, right, bottom = font.getbbox(letter)
        centre = (number + 0.5) * side / len(word.text)
        at = (centre - (left + right) / 2, (side - top - bottom) / 2)
        draw.text(at, letter, font=font, fill=RGB[word.colour])
    return image.reduce(OVERSAMPLING)


@lru_cache
def _font(side: int, *, size: Size) -> Any:
    """The largest font in which every letter keeps within its cell of a picture of ``side``."""
    (widest, highest), points = CELLS[size], side
    while True:
        font = ImageFont.load_default(points)
        boxes = [font.getbbox(letter) for letter in LETTERS]
        width = max(right - left for left, _, right, _ in boxes)
        height = max(bottom - top for _, top, _, bottom in boxes)
        if width <= widest * side and height <= highest * side:
            return font
        points -= 1


def word_caption(word: Word, *, rng: random.Random, language: Language) -> str:
    """One of the phrasings, chosen by ``rng``; all name the letters and the colour, some the
    background, and none the size."""
    quoted, colour, background = f'"{word.text}"', word.colour, word.background
    if language is Language.en:
        return rng.choice(
            (
                f"The word {quoted} in {colour}.",
                f"{quoted} written in {colour} letters.",
                f"On a {background} background: the word {quoted} in {colour}.",
            )
        )
    zh_colour = f"{ZH_COLOUR[colour]}\u8272"
    word_zh, behind, of = "\u5355\u8bcd", "\u80cc\u666f", "\u7684"
    return rng.choice(
        (
            f"{zh_colour}{of}{word_zh}{quoted}{ZH_STOP}",
            f"{ZH_BACKGROUND[background]}{behind}{ZH_COLON}{zh_colour}{of}{word_zh}{quoted}{ZH_STOP}",
        )
    )
