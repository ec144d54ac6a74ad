"""Pictures from outside: what is refused and why, what is accepted and how it looks afterwards."""

import io
import json
import random
import struct
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emu35.errors import DataError
from emu35.vision.resize import (
    MAX_PIXELS,
    MAX_SIDE,
    Reason,
    RejectedImage,
    header_size,
    open_image,
    smart_resize,
    to_image,
    to_pixels,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "smart_resize.json"
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]


def picture(*, width: int = 40, height: int = 24, seed: int = 0) -> Image.Image:
    """A few random colours, smooth enough for lossy formats."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 5, 3)).astype(np.uint8)
    return Image.fromarray(colours).resize((width, height))


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png_claiming(*, width: int, height: int) -> bytes:
    """A few bytes of PNG whose header claims a size that its data does not have."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def rejection(source: bytes | Path, **limits: int) -> str:
    with pytest.raises(RejectedImage) as caught:
        open_image(source, **limits)
    return str(caught.value)


@pytest.mark.golden
def test_sizes_equal_the_official_ones() -> None:
    for case in json.loads(GOLDEN.read_text()):
        width, height = case["in_wh"]
        size = smart_resize(width=width, height=height, area=case["area"])
        assert list(size) == case["out_wh"], case
        assert [size[1] // 16, size[0] // 16] == case["grid_hw"]


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(64, 1 << 20),
    st.sampled_from([4, 8, 16]),
)
def test_sizes_are_whole_grids_of_about_the_area(
    width: int, height: int, area: int, factor: int
) -> None:
    # The official formula truncates twice before it rounds; only where that leaves a side of less
    # than half a cell is there no grid to give.
    tall = int((area / (width / height)) ** 0.5)
    sides = {"height": tall, "width": int(tall * (width / height))}
    if min(sides.values()) < factor - factor // 2:
        with pytest.raises(RejectedImage, match="image too narrow"):
            smart_resize(width=width, height=height, area=area, factor=factor)
        return
    size = smart_resize(width=width, height=height, area=area, factor=factor)
    for new, exact in zip(size, (sides["width"], sides["height"]), strict=True):
        assert new % factor == 0
        assert abs(new - exact) <= factor / 2


def test_a_strip_is_refused_rather_than_resized_to_nothing() -> None:
    with pytest.raises(RejectedImage, match=r"^image too narrow: 16000x1$"):
        smart_resize(width=16000, height=1, area=512 * 512)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_opens_as_rgb(format: str, tmp_path: Path) -> None:
    original = picture()
    data = saved(original, format)
    opened = open_image(data)
    assert opened.mode == "RGB"
    assert opened.size == (40, 24)
    difference = np.asarray(opened).astype(int) - np.asarray(original)
    assert np.abs(difference).mean() < 12
    path = tmp_path / "picture"
    path.write_bytes(data)
    for source in (path, str(path)):
        assert open_image(source).tobytes() == opened.tobytes()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_a_truncated_picture_is_refused(format: str, share: float) -> None:
    data = saved(picture(width=200, height=150), format)
    assert rejection(data[: int(len(data) * share)]) == "truncated image"


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"hello", b"<svg xmlns='x'/>", b"%!PS-Adobe-3.0", b"PK\x03\x04" + bytes(99)],
)
def test_what_is_no_image_is_called_so(data: bytes) -> None:
    assert rejection(data) == "not an image"


@pytest.mark.parametrize(
    ("width", "height"),
    [(60_000, 10), (10, 60_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1), (12_000, 12_000)],
)
def test_size_is_refused_by_the_header_alone(width: int, height: int) -> None:
    open_image(saved(picture(), "PNG"))  # the decoders are imported
    start = time.perf_counter()
    reason = rejection(png_claiming(width=width, height=height))
    assert reason == f"image too large: {width}x{height}"
    assert time.perf_counter() - start < 0.1


def test_a_decompression_bomb_is_refused_without_a_warning() -> None:
    # 144 million pixels of one colour: a small file that Pillow itself would only warn of.
    data = saved(Image.new("1", (12_000, 12_000)), "PNG")
    assert len(data) < 30_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rejection(data) == "image too large: 12000x12000"


def test_a_webp_bomb_is_refused_by_its_header() -> None:
    for chunk in (
        b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xfe\x3f\x00" * 2,
        b"VP8L" + struct.pack("<I", 99) + b"\x2f" + struct.pack("<I", 16382 | 16382 << 14),
        b"VP8 " + struct.pack("<I", 99) + b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383),
    ):
        body = (b"WEBP" + chunk).ljust(200, b"\0")
        data = b"RIFF" + struct.pack("<I", len(body)) + body
        assert rejection(data) == "image too large: 16383x16383"


@pytest.mark.parametrize(
    "options", [{"lossless": True}, {"quality": 50}, {"quality": 50, "exif": Image.Exif()}]
)
def test_sizes_in_webp_headers_are_read_right(options: dict) -> None:
    data = saved(picture(width=57, height=31), "WEBP", **options)
    assert open_image(data, max_pixels=57 * 31, max_side=57).size == (57, 31)
    assert rejection(data, max_pixels=57 * 31 - 1) == "image too large: 57x31"


def test_limits_are_configurable() -> None:
    data = saved(picture(), "PNG")
    assert rejection(data, max_side=39) == "image too large: 40x24"
    assert rejection(data, max_pixels=40 * 24 - 1) == "image too large: 40x24"
    assert open_image(data, max_side=40, max_pixels=40 * 24).size == (40, 24)
    assert MAX_SIDE**2 > MAX_PIXELS


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert rejection(tmp_path / "absent.png").startswith("cannot read the file: No such file")
    assert rejection(tmp_path).startswith("cannot read the file: Is a directory")


def test_damaged_bytes_always_give_a_reason() -> None:
    files = [saved(picture(), format) for format in FORMATS]
    files += [saved(picture().quantize(8), "PNG"), saved(picture(), "TIFF", compression="tiff_lzw")]
    chance = random.Random(0)
    outcomes: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(600):
            data = bytearray(chance.choice(files))
            reach = chance.choice([64, 400, len(data)])
            for _ in range(chance.randint(1, 6)):
                data[chance.randrange(min(len(data), reach))] = chance.randrange(256)
            try:
                outcomes[open_image(bytes(data)).mode] += 1
            except RejectedImage as error:
                outcomes[error.reason] += 1
    assert outcomes.keys() > {"RGB", Reason.truncated, Reason.damaged, Reason.not_an_image}
    assert outcomes.keys() <= {"RGB", *Reason}


def test_a_refusal_is_a_data_error_that_can_be_counted() -> None:
    with pytest.raises(DataError) as caught:
        open_image(png_claiming(width=60_000, height=10))
    assert isinstance(caught.value, RejectedImage)
    assert caught.value.reason == "image too large"
    assert caught.value.detail == "60000x10"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(format: str, orientation: int) -> None:
    # Corners: red, green / blue, white, seen upright.
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, :48], upright[:32, 48:] = (255, 0, 0), (0, 255, 0)
    upright[32:, :48], upright[32:, 48:] = (0, 0, 255), (255, 255, 255)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = np.asarray(open_image(saved(Image.fromarray(stored.copy()), format, exif=exif)))
    assert opened.shape == upright.shape
    assert np.abs(opened.astype(int) - upright)[8::16, 8::16].max() < 40


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert np.unique(np.asarray(open_image(saved(clear, "PNG")))).tolist() == [255]
    assert np.unique(np.asarray(open_image(saved(half, "PNG")))).tolist() == [127]
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9])
    assert np.unique(np.asarray(open_image(saved(palette, "GIF", transparency=0)))).tolist() == [
        255
    ]
    grey = Image.new("LA", (4, 4), (30, 255))
    assert np.unique(np.asarray(open_image(saved(grey, "PNG")))).tolist() == [30]


def test_sixteen_bit_grey_keeps_its_range() -> None:
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for format in ("PNG", "TIFF"):
        opened = np.asarray(open_image(saved(Image.fromarray(levels), format)))
        assert np.abs(opened[..., 0] - levels / 257).max() <= 0.5
        assert (opened[..., 0] == opened[..., 2]).all()


def test_cmyk_and_palette_keep_their_colours() -> None:
    red = Image.new("RGB", (16, 16), (250, 10, 10))
    for data in (saved(red.convert("CMYK"), "JPEG"), saved(red.quantize(4), "PNG")):
        assert np.abs(np.asarray(open_image(data)).astype(int) - (250, 10, 10)).max() < 12


def test_floating_point_pictures_are_refused() -> None:
    data = saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    assert rejection(data) == "unsupported pixel type: F"


def test_pixels_are_scaled_as_the_release_does() -> None:
    image = picture()
    pixels = to_pixels(image)
    official = (np.array(image) / 127.5 - 1.0).transpose(2, 0, 1)
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, 24, 40)
    assert (pixels == official.astype(np.float32)).all()
    assert pixels.flags.c_contiguous


def test_pixels_are_resized_bicubically_to_the_area() -> None:
    image = picture(width=300, height=200)
    pixels = to_pixels(image, area=128 * 128)
    size = smart_resize(width=300, height=200, area=128 * 128)
    assert pixels.shape == (3, size[1], size[0])
    assert (pixels == to_pixels(image.resize(size, Image.Resampling.BICUBIC))).all()


def test_pixels_become_a_picture_again() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    again = np.asarray(to_image(to_pixels(Image.fromarray(levels)))).astype(int)
    assert set(np.unique(again - levels)) <= {-1, 0}  # truncation, as in the release
    assert to_image(np.full((3, 2, 2), 5.0)).getpixel((0, 0)) == (255, 255, 255)
    assert to_image(np.full((3, 2, 2), -5.0)).getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(DataError, match="not finite"):
        to_image(np.full((3, 2, 2), np.nan))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 6, 8])
def test_headers_tell_the_size_that_decoding_gives(format, orientation):
    image, options = picture(width=41, height=24), {}
    if orientation is not None and format in ("JPEG", "PNG", "WEBP", "TIFF"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    data = saved(image, format, **options)
    assert header_size(data) == open_image(data).size


def test_headers_are_enough_for_the_size():
    for format in ("JPEG", "PNG"):
        data = saved(picture(width=400, height=300), format)
        assert header_size(data[:1000]) == (400, 300)


def test_headers_are_refused_as_pictures_are():
    with pytest.raises(RejectedImage, match="image too large"):
        header_size(png_claiming(width=MAX_SIDE + 1, height=2))
    with pytest.raises(RejectedImage, match="not an image"):
        header_size(b"nothing")
    with pytest.raises(RejectedImage):
        header_size(saved(picture(), "JPEG")[:8])
