"""Packing small sources and looking at the rows, for the tests of packed shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shard_documents import CODEBOOK

from emu35.config.data import Packing, SourceConfig, TokenDataConfig
from emu35.data.batch import Batch
from emu35.data.loader import TokenLoader
from emu35.data.packed import PackOptions, PackSummary, pack_sources
from emu35.data.shards import ShardMeta
from emu35.data.writer import ShardWriter
from emu35.tokens.document import Document, Image, Part, Text
from emu35.tokens.serialize import TokenSequence, serialize
from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary

ROW = 96
SEED = 7
VOCABULARY = Vocabulary(n_text=256, codebook_size=CODEBOOK)
TENSORS = (
    "tokens",
    "labels",
    "label_modality",
    "label_valid",
    "label_source",
    "positions",
    "document_start",
)


def write_shards(
    folder: Path,
    documents: Sequence[Sequence[Part]],
    *,
    tokenizer: TextTokenizer,
    shard_bytes: int = 9000,
    **meta: Any,
) -> dict[str, TokenSequence]:
    """Write a source, named as its folder; gives the documents by their ids."""
    settings = {"kind": "bytes", "n_text": 256, "codebook_size": CODEBOOK, **meta}
    written: dict[str, TokenSequence] = {}
    with ShardWriter(
        folder=folder, meta=ShardMeta(source=folder.name, **settings), shard_bytes=shard_bytes
    ) as writer:
        for number, parts in enumerate(documents):
            id = f"{folder.name}/{number}"
            written[id] = serialize(Document(list(parts)), tokenizer)
            writer.append(written[id], document_id=id)
    return written


def varied(count: int, *, seed: int, longest: int = 30) -> list[list[Part]]:
    """Documents of which no part of a few tokens comes twice; those of up to 30 characters fit a
    row."""
    rng = np.random.default_rng(seed)

    def text(length: int) -> Text:
        return Text("".join(chr(code) for code in rng.integers(33, 127, size=length)))

    documents: list[list[Part]] = []
    for _ in range(count):
        shape = rng.integers(1, 5, size=2)
        picture = Image(rng.integers(0, CODEBOOK, size=shape))
        one, two = (text(length) for length in rng.integers(8, longest, size=2))
        kinds: list[list[Part]] = [[one], [one, picture], [picture, one], [one, picture, two]]
        documents.append(kinds[int(rng.integers(0, 4))])
    return documents


def pack(*inputs: Path, out: Path, **changes: Any) -> PackSummary:
    settings: dict[str, Any] = {"sequence_length": ROW, "source": out.name, "seed": SEED, **changes}
    return pack_sources(PackOptions(inputs=list(inputs), out=out, **settings))


def config_of(folders: dict[str, Path], **changes: Any) -> TokenDataConfig:
    settings: dict[str, Any] = {
        "sequence_length": ROW,
        "sources": {name: SourceConfig(path=str(path)) for name, path in folders.items()},
        "open_bins": 4,
        "shuffle_window": 8,
        **changes,
    }
    return TokenDataConfig(**settings)


def offline(folder: Path, *, name: str, **changes: Any) -> TokenDataConfig:
    return config_of({name: folder}, packing=Packing.offline, **changes)


def loader_of(data: TokenDataConfig, *, batch: int, micro: int = 1, **changes: Any) -> TokenLoader:
    settings: dict[str, Any] = {"dp_rank": 0, "dp_size": 1, **changes}
    return TokenLoader(
        data=data,
        vocabulary=VOCABULARY,
        seed=SEED,
        global_batch_size=batch,
        micro_batch_size=micro,
        **settings,
    )


def first_rows(data: TokenDataConfig, *, count: int) -> list[tuple[bytes, ...]]:
    """All tensors of the first ``count`` rows of the stream, a row at a time."""
    with loader_of(data, batch=count) as loader:
        return rows_of(loader.next_step())


def rows_of(batches: Sequence[Batch]) -> list[tuple[bytes, ...]]:
    stacked = [torch.cat([getattr(batch, name) for batch in batches]) for name in TENSORS]
    return [
        tuple(tensor[row].numpy().tobytes() for tensor in stacked) for row in range(len(stacked[0]))
    ]


def documents_in(batch: Batch, *, row: int) -> list[list[int]]:
    """The tokens of each piece of a row."""
    starts = batch.document_start[row].tolist()
    first = sorted({start for start in starts if start < len(starts)})
    return [batch.tokens[row, at : at + starts.count(at)].tolist() for at in first]
