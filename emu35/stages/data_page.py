"""Documents of shards as one HTML page: specials visible, pictures in their places."""

import colorsys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
import numpy.typing as npt

from emu35.data.show import ShownDocument
from emu35.log.charts import chart_page
from emu35.stages.inline import Picture, ascii_page, picture_tag, words
from emu35.tokens.document import Broken, Image, Part, Special, Text
from emu35.tokens.serialize import Modality
from emu35.vision.codec import ImageCodec, decode_grids
from emu35.vision.resize import to_image

_SIDE = 128
_BAR_COLUMNS = 1024
_COLOURS = {
    Modality.TEXT: (47, 111, 222),
    Modality.VISUAL: (43, 138, 62),
    Modality.LAYOUT: (217, 72, 15),
    Modality.CONTROL: (156, 54, 181),
}

_STYLE = """<style>
article { margin: 0 0 22px; padding: 14px 16px; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px; }
article h2 { font-size: 15px; margin: 0; overflow-wrap: anywhere; }
.facts { color: var(--soft); font-size: 13px; margin: 0 0 8px; overflow-wrap: anywhere; }
.bar { width: 100%; height: 10px; display: block; border-radius: 3px; image-rendering: pixelated; }
.body { white-space: pre-wrap; overflow-wrap: anywhere; margin: 10px 0 0; }
.body img { vertical-align: top; max-width: 100%; image-rendering: pixelated; margin: 2px; }
.special { color: var(--soft); font: 12px ui-monospace, monospace; padding: 0 2px; }
.bad { color: #d9480f; font-weight: 600; }
.mark { padding: 10px 16px; border: 2px solid #d9480f; border-radius: 12px; margin: 0 0 22px; }
.legend { margin: 0 0 18px; }
</style>"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A document on the page, below lines of ``facts`` on where it was met."""

    document: ShownDocument
    facts: Sequence[str] = field(default_factory=list[str])


class Painter:
    """Pictures from codes: what the image tokenizer makes of them, or without it a map of codes, a
    colour a code."""

    def __init__(self, codec: ImageCodec | None) -> None:
        self._codec = codec

    @property
    def decodes(self) -> bool:
        return self._codec is not None

    def paint(self, images: Sequence[Image]) -> list[Picture]:
        """Pixels of each."""
        if self._codec is None:
            return [code_map(image.codes_HW) for image in images]
        grids = [image.codes_HW for image in images]
        return [np.asarray(to_image(pixels)) for pixels in decode_grids(self._codec, grids)]


def code_map(codes_HW: npt.NDArray[np.integer]) -> Picture:
    """Pixels [H, W, 3]: the same colour for the same code everywhere, unlike ones for neighbours.

    Hues go round by the golden ratio, which keeps those of consecutive codes far apart.
    """
    codes, place = np.unique(codes_HW, return_inverse=True)
    colours = [
        colorsys.hsv_to_rgb(code * 0.618034 % 1, 0.45 + 0.5 * (code * 0.754878 % 1), 0.9)
        for code in codes.tolist()
    ]
    table = np.round(255 * np.array(colours)).astype(np.uint8)
    return table[place.reshape(codes_HW.shape)]


def documents_page(
    entries: Iterable[Entry], *, painter: Painter, title: str, lead: str, above: str = ""
) -> str:
    """The page as ASCII text; ``above`` is HTML before the documents."""
    shown = (
        "Pictures are decoded."
        if painter.decodes
        else "Pictures are maps of their codes, a colour a code; name the image tokenizer with "
        "--vision to decode them."
    )
    articles = "".join(_article(entry, painter=painter) for entry in entries)
    return ascii_page(
        chart_page(
            "",
            title=title,
            lead=f"{lead} {shown}",
            above=f"{_STYLE}{_legend()}{above}",
            below=articles,
        )
    )


def marked(text: str) -> str:
    """A line that stands out."""
    return f'<div class="mark">{words(text)}</div>'


def _legend() -> str:
    names = "".join(
        f'<span><i style="background:rgb{colour}"></i>{code.name.lower()}</span>'
        for code, colour in _COLOURS.items()
    )
    return f'<div class="legend">{names}</div>'


def _article(entry: Entry, *, painter: Painter) -> str:
    document = entry.document
    counts = np.bincount(document.modality, minlength=len(Modality))
    shares = ", ".join(f"{counts[code]} {code.name.lower()}" for code in Modality)
    facts = [
        *entry.facts,
        f"{document.shard}, members {document.member}; {_range(document)}: {shares}",
        *(f"{key}: {value}" for key, value in document.extra.items()),
    ]
    pictures = iter(painter.paint(document.images))
    body = "".join(_part(part, pictures=pictures) for part in document.parts)
    return (
        f"<article><h2>{words(document.source)}, document {document.number}, id "
        f"{words(document.id)}</h2>"
        + "".join(f'<div class="facts">{words(fact, most=500)}</div>' for fact in facts)
        + f'{modality_bar(document.modality)}<div class="body" dir="auto">{body}</div></article>\n'
    )


def _range(document: ShownDocument) -> str:
    if document.tokens == document.length:
        return f"{document.length} tokens"
    return f"tokens [{document.start}, {document.end}) of {document.length}"


def _part(part: Part, *, pictures: Iterator[Picture]) -> str:
    match part:
        case Text():
            return words(part.text)
        case Special():
            return f'<span class="special">{words(part.token)}</span>'
        case Image():
            rows, columns = np.shape(part.codes_HW)
            return picture_tag(next(pictures), side=_SIDE, alt=f"image {rows}x{columns}")
        case Broken():
            return f'<span class="bad">[{escape(part.reason)}, {len(part.ids)} tokens]</span>'


def modality_bar(modality: npt.NDArray[np.uint8]) -> str:
    """A stripe of colours from the first token to the last, as an image."""
    palette = np.array([_COLOURS[code] for code in Modality], np.uint8)
    columns = min(len(modality), _BAR_COLUMNS)
    at = np.arange(columns) * len(modality) // max(columns, 1)
    tag = picture_tag(palette[modality[at]][None], side=1, alt="modality of the tokens")
    return tag.replace("<img ", '<img class="bar" ')
