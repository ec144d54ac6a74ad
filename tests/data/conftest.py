"""Small shards made of real documents, for the tests of ``emu35.data``."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from shard_documents import CODEBOOK, WriteSource

from emu35.config.tokenizer import TokenizerConfig
from emu35.data.shards import ShardMeta
from emu35.data.writer import ShardWriter
from emu35.tokens.document import Document, Part
from emu35.tokens.serialize import serialize
from emu35.tokens.text import TextTokenizer, build_text_tokenizer


@pytest.fixture
def tokenizer() -> TextTokenizer:
    return build_text_tokenizer(TokenizerConfig(codebook_size=CODEBOOK))


@pytest.fixture
def write_source(tmp_path: Path, tokenizer: TextTokenizer) -> WriteSource:
    """Returns ``write(name, documents, shard_bytes=...)``, which gives the folder of the shards."""

    def write(name: str, documents: Sequence[Sequence[Part]], *, shard_bytes: int = 2**20) -> Path:
        meta = ShardMeta(source=name, kind="bytes", n_text=256, codebook_size=CODEBOOK)
        folder = tmp_path / name
        with ShardWriter(folder=folder, meta=meta, shard_bytes=shard_bytes) as writer:
            for number, parts in enumerate(documents):
                document = Document(list(parts), source=name, id=str(number))
                writer.append(serialize(document, tokenizer), document_id=str(number))
        return folder

    return write
