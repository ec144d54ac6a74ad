"""Pictures from outside: opened with suspicion, resized as the release does, turned to numbers.

A file from the web may be anything, so the header is read before a single pixel is decoded: only
formats of the list below are tried (others, such as EPS, run whole interpreters), and a picture
that claims too many pixels is refused at once. Refusals are :class:`RejectedImage`, whose
``reason`` is one of :class:`Reason` and therefore can be counted.

Sizes follow the official ``smart_resize`` to the pixel, pixel values its ``x / 127.5 - 1``.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from emu35.errors import DataError

MAX_SIDE = 16_384
"""Longest side accepted by default, in pixels: the widest a WebP can be, and more than any camera
gives. Wider pictures are stitched strips, of which a grid of codes keeps nothing."""

MAX_PIXELS = 2**27
"""Most pixels accepted by default: 134 million, above 100-megapixel cameras, 400 MB as RGB."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


class Reason(StrEnum):
    """Why a picture is refused, in few and stable words."""

    unreadable = "cannot read the file"
    not_an_image = "not an image"
    truncated = "truncated image"
    damaged = "damaged image"
    too_large = "image too large"
    too_narrow = "image too narrow"
    unsupported = "unsupported pixel type"


class RejectedImage(DataError):
    """A picture that cannot be used. ``str()`` is ``reason``, or ``reason: detail``."""

    def __init__(self, *, reason: Reason, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)


def smart_resize(*, width: int, height: int, area: int, factor: int = 16) -> tuple[int, int]:
    """(width, height) of about ``area`` pixels, near the given aspect, multiples of ``factor``.

    The official formula, in the same order of floating-point operations; small pictures grow.

    Raises:
        RejectedImage: if the aspect is so extreme that a side would vanish.
    """
    if min(width, height, area, factor) < 1:
        raise ValueError(f"{width=}, {height=}, {area=} and {factor=} must be at least 1")
    aspect = width / height
    new_height = int((area / aspect) ** 0.5)
    new_width = int(new_height * aspect)
    new_height = (new_height + factor // 2) // factor * factor
    new_width = (new_width + factor // 2) // factor * factor
    if min(new_width, new_height) < factor:
        raise RejectedImage(reason=Reason.too_narrow, detail=f"{width}x{height}")
    return new_width, new_height


def open_image(
    source: bytes | str | Path, *, max_pixels: int = MAX_PIXELS, max_side: int = MAX_SIDE
) -> Image.Image:
    """The first frame of ``source`` as 8-bit RGB, upright.

    The EXIF orientation is applied, transparency is laid on white (its hidden colours are noise),
    16-bit grey is scaled to 8, CMYK and palettes are converted.

    Raises:
        RejectedImage: with the reason; sizes are checked before anything is decoded.
    """

    with _stream(source) as stream, _rejecting():
        picture = _open_checked(stream, max_pixels=max_pixels, max_side=max_side)
        picture.load()
        return _to_rgb(_upright(picture))


def header_size(
    source: bytes | str | Path, *, max_pixels: int = MAX_PIXELS, max_side: int = MAX_SIDE
) -> tuple[int, int]:
    """(width, height) that :func:`open_image` would give, with no pixel decoded where the format
    allows. The first bytes of a file are enough if they hold its header.

    Raises:
        RejectedImage: with the reason.
    """
    with _stream(source) as stream, _rejecting():
        picture = _open_checked(stream, max_pixels=max_pixels, max_side=max_side)
        width, height = picture.size
        # Asked for what it has not met in a header, a PNG decodes all of itself.
        turned = "exif" in picture.info and _orientation(picture) >= _FIRST_ON_ITS_SIDE
        return (height, width) if turned else (width, height)


def to_pixels(
    image: Image.Image, *, area: int | None = None, factor: int = 16
) -> NDArray[np.float32]:
    """RGB ``image`` as float32 [3, H, W] in [-1, 1], x / 127.5 - 1.

    With ``area`` the picture is first resized (bicubic) to what :func:`smart_resize` gives.
    """
    if area is not None:
        width, height = image.size
        size = smart_resize(width=width, height=height, area=area, factor=factor)
        image = image.resize(size, Image.Resampling.BICUBIC)
    values_HW3 = _LEVELS[np.asarray(image.convert("RGB"))]
    return np.ascontiguousarray(values_HW3.transpose(2, 0, 1))


def to_image(pixels: NDArray[np.floating]) -> Image.Image:
    """[3, H, W] floats in [-1, 1] as an RGB picture; clamped and truncated as the release does.

    Truncation makes ``to_image(to_pixels(x))`` differ from ``x`` by one in a few of the 256 levels.

    Raises:
        DataError: if a value is not finite.
    """
    values = np.asarray(pixels, dtype=np.float32)
    if values.ndim != 3 or values.shape[0] != 3:
        raise ValueError(f"pixels have shape {list(values.shape)}; expected [3, H, W]")
    if not np.isfinite(values).all():
        raise DataError("decoded pixels are not finite; the image tokenizer's weights are damaged")
    levels_3HW = np.clip((values + np.float32(1)) * np.float32(127.5), 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(levels_3HW.transpose(1, 2, 0)))


# Computed in double precision and rounded once, as the official code does.
_LEVELS = (np.arange(256) / 127.5 - 1.0).astype(np.float32)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what undoes it."""

_FIRST_ON_ITS_SIDE = 5
"""This orientation and those above it exchange width and height."""

_ORIENTATION_TAG = 0x0112

# What Pillow raises on bytes that lie about themselves, found by mutating files of every format.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,  # where the caller turned warnings into errors
)


@contextmanager
def _stream(source: bytes | str | Path) -> Iterator[IO[bytes]]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    try:
        with Path(source).open("rb") as file:
            yield file
    except OSError as error:  # the decoders' own OSErrors have become reasons by now
        raise RejectedImage(reason=Reason.unreadable, detail=error.strerror or "") from None


@contextmanager
def _rejecting() -> Iterator[None]:
    """Turn whatever a decoder throws into a reason."""
    try:
        yield
    except RejectedImage:
        raise
    except _DECODER_ERRORS as error:
        cut = "truncated" in str(error).lower() or isinstance(error, EOFError)
        raise RejectedImage(reason=Reason.truncated if cut else Reason.damaged) from error


def _open_checked(stream: IO[bytes], *, max_pixels: int, max_side: int) -> ImageFile.ImageFile:
    """The picture of ``stream``, not too large, with its header read."""

    def check(width: int, height: int) -> None:
        if max(width, height) > max_side or width * height > max_pixels:
            raise RejectedImage(reason=Reason.too_large, detail=f"{width}x{height}")

    prefix = stream.read(_PREFIX)
    if prefix[:4] == b"RIFF" and prefix[8:12] == b"WEBP":
        check(*_webp_size(prefix, length=stream.seek(0, io.SEEK_END)))
    picture = _open_header(stream, prefix=prefix)
    check(*picture.size)
    return picture


def _open_header(stream: IO[bytes], *, prefix: bytes) -> ImageFile.ImageFile:
    """The picture of ``stream`` with its header read and no pixel decoded.

    ``PIL.Image.open`` would apply limits of its own, which are global to the process and tell no
    size, so the decoders are asked directly.
    """
    Image.init()
    for name in FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        if accept is None or accept(prefix) is True:
            stream.seek(0)
            return factory(stream, "")
    raise RejectedImage(reason=Reason.not_an_image)


_PREFIX = 32


def _webp_size(prefix: bytes, *, length: int) -> tuple[int, int]:
    """(width, height) that the header of a WebP file of ``length`` bytes claims.

    Its decoder allocates the whole canvas before telling the size, and gives the same error for a
    file that was cut off and one that is damaged.
    """
    declared, chunk = int.from_bytes(prefix[4:8], "little") + 8, prefix[12:16]
    if length < max(declared, _PREFIX):
        raise RejectedImage(reason=Reason.truncated)
    if chunk == b"VP8X":
        sides = (int.from_bytes(prefix[24:27], "little"), int.from_bytes(prefix[27:30], "little"))
        return sides[0] + 1, sides[1] + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(prefix[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", prefix, 26)
    return width & 0x3FFF, height & 0x3FFF


def _upright(picture: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where there is none."""
    try:
        found = picture.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS:
        return 1  # damaged metadata; the pixels are whole
    return found if found in _UPRIGHT else 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise RejectedImage(reason=Reason.unsupported, detail="F")
    if picture.mode.startswith("I"):
        # 16-bit grey; a plain conversion would clip everything above 255 to white.
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise RejectedImage(reason=Reason.unsupported, detail=picture.mode)
        return Image.fromarray((values / 257.0).round().astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return picture.convert("RGB")
