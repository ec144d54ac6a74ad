"""Pictures made here, in folders and in tars of webdataset's layout."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def encoded(image: Image.Image) -> bytes:
    """As PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def plain(level: int, *, width: int = 40, height: int = 40) -> bytes:
    """One grey."""
    return encoded(Image.new("RGB", (width, height), (level, level, level)))


def texture(number: int, *, width: int = 96, height: int = 96) -> Image.Image:
    """Smooth colours with some grain, another picture for each number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    grain = rng.normal(0, 6, size=(height, width, 3))
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(4))


def marked(image: Image.Image) -> Image.Image:
    """With writing across, as stock photographs have it."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for top in range(4, image.height, 24):
        draw.text((2, top), "SAMPLE sample SAMPLE sample", fill=(255, 255, 255))
    return image


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def words(**values: object) -> bytes:
    """JSON."""
    return json.dumps(values).encode()
