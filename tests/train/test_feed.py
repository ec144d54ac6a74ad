"""One read for all tensor-parallel ranks of a replica, on four real ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
from torchrun_ranks import run_ranks

from emu35.config import TokenizerConfig
from emu35.data.shards import ShardMeta
from emu35.data.writer import ShardWriter
from emu35.tokens.document import Document, Image, Text
from emu35.tokens.serialize import serialize
from emu35.tokens.text import build_text_tokenizer

WORKER = Path(__file__).with_name("feed_worker.py")
CODEBOOK = 64


def write_shards(folder: Path) -> None:
    tokenizer = build_text_tokenizer(TokenizerConfig(codebook_size=CODEBOOK))
    meta = ShardMeta(source="a", kind="bytes", n_text=256, codebook_size=CODEBOOK)
    rng = np.random.default_rng(1)
    with ShardWriter(folder=folder, meta=meta) as writer:
        for number in range(40):
            picture = Image(rng.integers(0, CODEBOOK, size=(3, 3)))
            document = Document([Text(f"caption {number}"), picture], source="a", id=str(number))
            writer.append(serialize(document, tokenizer), document_id=str(number))


@pytest.mark.multiproc
def test_one_rank_reads_for_its_tensor_parallel_group(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    trace = tmp_path / "trace.json"
    run_ranks([str(WORKER), str(tmp_path / "shards"), str(trace)], ranks=4, timeout=120)
    found = json.loads(trace.read_text())
    assert sorted((rank["dp"], rank["tp"]) for rank in found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for rank in found:
        assert rank["equal"], "every rank holds what a loader of its own would have read"
        assert rank["rows"] == 3 * 4 / 2
        assert (rank["opened"] > 0) == (rank["tp"] == 0)
        # Who reads finds the damage; who receives is told of it.
        assert "changed after it was indexed" in rank["said"]
