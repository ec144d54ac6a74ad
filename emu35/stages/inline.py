"""What goes into a page that is one file: words that any browser shows, pictures as data URIs."""

import base64
import io
import re
from html import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

Picture = npt.NDArray[np.uint8]
"""Pixels [H, W, 3]."""

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def words(text: str, *, most: int | None = None) -> str:
    """``text`` for HTML, shown and never obeyed; no more than ``most`` characters of it.

    Control characters, which HTML does not permit, are marked.
    """
    shown = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    if most is not None and len(shown) > most:
        shown = f"{shown[:most]} ... ({len(shown) - most:,} more characters)"
    # A lone surrogate has no character reference.
    return escape(shown.encode("utf-8", errors="replace").decode("utf-8"))


def ascii_page(page: str) -> str:
    """A page for any editor and browser, whatever its encoding is taken for."""
    return page.encode("ascii", errors="xmlcharrefreplace").decode("ascii")


def picture_tag(picture: Picture, *, side: int, alt: str = "") -> str:
    """An ``<img>`` with the pixels in it; small pictures are shown enlarged by a whole factor, so
    that the shorter side reaches up to ``side`` pixels."""
    factor = enlargement(picture, side=side)
    height, width = picture.shape[0] * factor, picture.shape[1] * factor
    data = base64.b64encode(png_bytes(Image.fromarray(np.ascontiguousarray(picture)))).decode()
    return (
        f'<img alt="{escape(alt)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}">'
    )


def enlargement(picture: Picture, *, side: int) -> int:
    """The whole factor that brings the shorter side of a picture up to ``side`` pixels at most."""
    height, width = picture.shape[:2]
    return max(1, side // max(1, min(height, width)))


def png_bytes(image: Image.Image) -> bytes:
    """A PNG file."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
