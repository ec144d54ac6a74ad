"""A release in memory once: loading it takes the parameters' own memory and little else."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torchrun_ranks import run_ranks

from emu35.checkpoint.hf_config import CONFIG_JSON, config_json
from emu35.checkpoint.release_folder import TEXT_FOLDER, write_json
from emu35.checkpoint.safetensor_files import write_safetensors
from emu35.config import LMConfig, Precision, TokenizerConfig
from emu35.model.shapes import hf_shapes
from emu35.tokens.release_files import write_text_tokenizer
from emu35.tokens.vocabulary import vocabulary_of

WORKER = Path(__file__).parent / "load_memory_worker.py"
TOKENIZER = TokenizerConfig(codebook_size=32768)
# 202 MB in fp32, a third each: embedding, output layer, and one layer with a large gate and up.
MODEL = LMConfig(
    num_layers=1,
    hidden_size=512,
    ffn_hidden_size=10240,
    num_attention_heads=8,
    num_kv_heads=4,
    head_dim=64,
)
MOST = 1.1
"""A second copy of the embedding would make 1.3, one of gate and up 1.2."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux' /proc")


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same weights in fp32 and in bf16."""
    vocabulary = vocabulary_of(TOKENIZER)
    assert vocabulary.size % 2 == 1, "two ranks need a padding row"
    shapes = hf_shapes(MODEL, vocabulary_size=vocabulary.size)
    weights = {name: torch.full(shape, 0.5) for name, shape in shapes.items()}
    folders: list[str] = []
    for precision, dtype in (
        (Precision.fp32, torch.float32),
        (Precision.bf16, torch.bfloat16),
    ):
        folder = tmp_path_factory.mktemp(precision.value)
        write_safetensors(weights, folder=folder, dtype=dtype)
        content = config_json(
            MODEL, vocabulary=vocabulary, precision=precision, image_area=1_048_576
        )
        write_json(content, path=folder / CONFIG_JSON)
        write_text_tokenizer(folder / TEXT_FOLDER, config=TOKENIZER)
        folders.append(str(folder))
    return folders


@pytest.mark.multiproc
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_loading_takes_the_memory_of_one_copy(releases: list[str], ranks: int) -> None:
    output = run_ranks([str(WORKER), *releases], ranks=ranks, timeout=200)
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(rows) == 4 * ranks, output
    assert {(row["stored"], row["loaded"]) for row in rows} == {
        (stored.value, loaded.value) for stored in Precision for loaded in Precision
    }
    for row in rows:
        bytes_each = 4 if row["loaded"] == "fp32" else 2
        assert row["bytes"] == pytest.approx(50.5e6 / ranks * bytes_each, rel=0.05)
        # Less than one copy would mean that nothing was measured.
        assert 0.9 < row["growth"] < MOST, rows
