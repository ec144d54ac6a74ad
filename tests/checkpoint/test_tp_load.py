"""A model loaded for inference in several ranks is the model of one process."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_lm
from torchrun_ranks import run_ranks
from tp_load_worker import logits

from emu35.checkpoint import sharded
from emu35.checkpoint.manager import CheckpointManager
from emu35.checkpoint.source import describe, load_model, open_source
from emu35.config import (
    CheckpointConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    TokenizerConfig,
)
from emu35.config.io import write_config
from emu35.errors import ConfigError
from emu35.model.build import build_model
from emu35.model.init import initialize
from emu35.parallel.mesh import single_process_mesh
from emu35.stages.release import ExportOptions, export
from emu35.tokens.vocabulary import vocabulary_of

WORKER = Path(__file__).parent / "tp_load_worker.py"
MODEL = tiny_lm(num_attention_heads=12, num_kv_heads=4, init_std=0.2)
# An odd number of ids: two tensor-parallel ranks need a padding row.
TOKENIZER = TokenizerConfig(codebook_size=16)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of one process, and its release."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run.mkdir()
    write_config(RunConfig(model=MODEL, tokenizer=TOKENIZER), run)
    single_process_mesh()
    vocabulary = vocabulary_of(TOKENIZER)
    assert vocabulary.size % 2 == 1
    model = build_model(MODEL, vocabulary_size=vocabulary.size)
    initialize(model, seed=5, pad_id=vocabulary.pad)
    CheckpointManager(root=run / "checkpoints", config=CheckpointConfig(), identity={}).save(
        1, write=lambda place: sharded.save(place, chunks=[model], optimizer=None), extra={}
    )
    release = tmp_path_factory.mktemp("releases") / "tiny"
    export(ExportOptions(run=run, out=release), message=lambda text: None)
    return {"run": run, "release": release}


@pytest.mark.multiproc
@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_hold_slices_and_give_the_same_logits(
    sources: dict[str, Path], tmp_path: Path, tp: int
) -> None:
    model = open_source(sources["release"], message=lambda text: None).model
    whole = {"parameters": dict(model.named_parameters()), "logits": logits(model)}
    torch.save(whole, tmp_path / "whole.pt")
    places = [str(tmp_path), *map(str, sources.values())]
    run_ranks([str(WORKER), *places], ranks=tp, timeout=120)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (ParallelConfig(tp=8), r"tp=8 does not divide num_kv_heads=4; use tp in \{1, 2, 4\}"),
        (ParallelConfig(tp=5), "tp=5 does not divide ffn_hidden_size=48"),
        (ParallelConfig(pp=2), "pp=2 cannot generate: .* use pp=1 and split the model by tp"),
        (ParallelConfig(cp=2), "cp=2 cannot generate: .* use cp=1"),
        (ParallelConfig(tp=2, sp=True), "sp=true cannot generate: .* use sp=false"),
        (ParallelConfig(tp=0), "tp=0"),
        (ParallelConfig(tp=2), "tp=2 .* does not divide the 1 ranks started; start a multiple of"),
    ],
)
def test_what_cannot_be_loaded_says_why(
    sources: dict[str, Path], parallel: ParallelConfig, words: str
) -> None:
    described = describe(sources["release"])
    with pytest.raises(ConfigError, match=words):
        load_model(described, precision=Precision.fp32, parallel=parallel)
    # Nothing is left behind that would keep one process from working.
    assert load_model(described, precision=Precision.fp32).output_weight.shape[0] == 483
