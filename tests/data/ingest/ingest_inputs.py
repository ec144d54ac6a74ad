"""Inputs for the tests of ingestion, an encoder that stands in for the image tokenizer, and ways
to look at what came out."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as Pictures

from emu35.config.tokenizer import TokenizerConfig
from emu35.data.ingest.options import IngestOptions
from emu35.data.ingest.pictures import UnusablePicture
from emu35.data.source import Source
from emu35.tokens.serialize import deserialize
from emu35.tokens.text import build_text_tokenizer
from emu35.vision.resize import RejectedImage, open_image

TOKENIZER = TokenizerConfig(codebook_size=64)
FACTOR = 8


class GreyLevels:
    """One code for each 8x8 block: its mean grey, in 64 levels. Counts what it encodes."""

    digest = "grey" * 16
    dtype = "float32"
    factor = FACTOR

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.calls: list[int] = []
        self.stop_after = stop_after

    def join(self, *, worker: int, workers: int) -> None:
        """Nothing to share."""

    def check(self) -> None:
        """Nothing to load."""

    def prepare(self, data: bytes | Path) -> Pictures.Image:
        try:
            picture = open_image(data)
        except RejectedImage as error:
            raise UnusablePicture(reason=error.reason.value, detail=error.detail) from error
        sides = [max(1, side // FACTOR) * FACTOR for side in picture.size]
        resized = picture.resize((sides[0], sides[1]))
        resized.info = {"source_size": picture.size}
        return resized

    def encode(self, pictures: Sequence[Pictures.Image]) -> list[npt.NDArray[np.integer[Any]]]:
        if self.stop_after is not None and sum(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(len(pictures))
        assert len({picture.size for picture in pictures}) == 1
        return [codes_of(picture) for picture in pictures]


def codes_of(picture: Pictures.Image) -> npt.NDArray[np.integer[Any]]:
    grey = np.asarray(picture.convert("L")).astype(int)
    height, width = grey.shape
    blocks = grey.reshape(height // FACTOR, FACTOR, width // FACTOR, FACTOR)
    return blocks.mean(axis=(1, 3)).astype(int) // 4


def png(*, width: int, height: int, grey: int) -> bytes:
    buffer = io.BytesIO()
    Pictures.new("RGB", (width, height), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pairs(path: Path, *, count: int, first: int = 0, bad: int = 0) -> Path:
    """A tar of captioned pictures of three sizes; the first ``bad`` hold no picture."""
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            size = [(32, 32), (48, 24), (24, 40)][number % 3]
            picture = png(width=size[0], height=size[1], grey=number * 5 % 256)
            if number - first < bad:
                picture = b"<html>not found</html>"
            caption = f"caption {number}".encode()
            for kind, data in (("png", picture), ("txt", caption)):
                info = tarfile.TarInfo(f"{number:05d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def options_of(inputs: list[Path], out: Path, **changes: Any) -> IngestOptions:
    settings: dict[str, Any] = {"source": "demo", "tokenizer": TOKENIZER, **changes}
    return IngestOptions(inputs=inputs, out=out, **settings)


def documents_of(folder: Path) -> list[tuple[str, list[Any]]]:
    tokenizer = build_text_tokenizer(TOKENIZER)
    source = Source(name="demo", path=folder, vocabulary=tokenizer.vocabulary)
    return [
        (
            json.loads(source.facts(number))["id"],
            deserialize(source.words(number)[0].tolist(), tokenizer).parts,
        )
        for number in range(len(source))
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".tar", ".idx")
    }


def rejects_of(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
