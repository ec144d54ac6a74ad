"""Shards that the tests of looking at data share, and what is on a page."""

import base64
import io
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image as Pictures

from emu35.config.tokenizer import TokenizerConfig
from emu35.data.shards import ShardMeta
from emu35.data.writer import ShardWriter
from emu35.tokens.document import Document, Image, Part, Text
from emu35.tokens.serialize import serialize
from emu35.tokens.text import build_text_tokenizer

CODES = 64


def write_shards(
    folder: Path,
    documents: Sequence[Sequence[Part]],
    *,
    vision: str | None = None,
    shard_bytes: int = 2**20,
) -> Path:
    """Shards under the bytes tokenizer; ids are ``NAME-0`` and so on."""
    meta = ShardMeta(
        source=folder.name, kind="bytes", n_text=256, codebook_size=CODES, vision=vision
    )
    tokenizer = build_text_tokenizer(TokenizerConfig(codebook_size=CODES))
    with ShardWriter(folder=folder, meta=meta, shard_bytes=shard_bytes) as writer:
        for number, parts in enumerate(documents):
            sequence = serialize(Document(list(parts)), tokenizer)
            writer.append(sequence, document_id=f"{folder.name}-{number}", extra={"line": number})
    return folder


def scenes(count: int, *, seed: int = 0) -> list[list[Part]]:
    """A caption and a picture each, of sizes that differ."""
    rng = np.random.default_rng(seed)
    documents: list[list[Part]] = []
    for number in range(count):
        rows, columns = rng.integers(1, 5, size=2).tolist()
        codes = rng.integers(0, CODES, size=(rows, columns))
        documents.append([Text(f"caption {number} " + "x" * int(rng.integers(30))), Image(codes)])
    return documents


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


class Page:
    """What a browser would show of the file at ``path``: words, tags, and pictures as RGB."""

    def __init__(self, path: Path) -> None:
        page = _Page()
        page.feed(path.read_text(encoding="ascii"))
        # One file, to be opened anywhere, and nothing in it runs.
        assert all(source.startswith("data:image/png;base64,") for source in page.sources)
        assert "script" not in page.tags
        self.text, self.tags = page.text, page.tags
        self.pictures = [
            Pictures.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB")
            for source in page.sources
        ]
