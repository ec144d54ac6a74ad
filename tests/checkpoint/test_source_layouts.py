"""A run trained in parallel opens in one process as the very same model."""

import os
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_lm
from torch.multiprocessing.spawn import spawn

from emu35.checkpoint import sharded
from emu35.checkpoint.manager import CheckpointManager
from emu35.checkpoint.source import open_source
from emu35.config import CheckpointConfig, ParallelConfig, RunConfig, TokenizerConfig
from emu35.config.io import write_config
from emu35.model.build import build_chunks, build_model
from emu35.model.init import initialize
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import init_mesh, leave, single_process_mesh
from emu35.tokens.vocabulary import vocabulary_of

MODEL = tiny_lm()
# An odd number of ids: two tensor-parallel ranks need a padding row.
TOKENIZER = TokenizerConfig(codebook_size=16)
LAYOUTS = {
    "tp2": ParallelConfig(tp=2, sp=True),
    "pp2": ParallelConfig(pp=2),
    "dp2": ParallelConfig(),
}


def write_checkpoints(rank: int, folder: str, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2"
    )
    vocabulary = vocabulary_of(TOKENIZER)
    for layout, parallel in LAYOUTS.items():
        init_mesh(parallel, seed=0, timeout=60)
        chunks = build_chunks(MODEL, vocabulary_size=vocabulary.size, parallel=parallel)
        for chunk in chunks:
            initialize(chunk, seed=5, pad_id=vocabulary.pad)
        manager = CheckpointManager(
            root=Path(folder) / layout / "checkpoints", config=CheckpointConfig(), identity={}
        )

        def write(place: Path, chunks: list[Emu35Model] = chunks) -> None:
            sharded.save(place, chunks=chunks, optimizer=None)

        manager.save(1, write=write, extra={})
    leave()


@pytest.mark.multiproc
def test_opens_in_one_process(tmp_path: Path) -> None:
    vocabulary = vocabulary_of(TOKENIZER)
    assert vocabulary.size % 2 == 1
    spawn(write_checkpoints, args=(str(tmp_path), 20000 + os.getpid() % 20000), nprocs=2)
    single_process_mesh()
    expected = build_model(MODEL, vocabulary_size=vocabulary.size)
    initialize(expected, seed=5, pad_id=vocabulary.pad)
    for layout, parallel in LAYOUTS.items():
        run = RunConfig(model=MODEL, tokenizer=TOKENIZER, parallel=parallel)
        write_config(run, tmp_path / layout)
        opened = open_source(tmp_path / layout, message=lambda text: None).model
        found = dict(opened.named_parameters())
        for name, parameter in expected.named_parameters():
            assert torch.equal(found[name], parameter), (layout, name)
