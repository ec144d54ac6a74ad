import json
import subprocess
import sys
from pathlib import Path

import pytest

from emu35.config import LMConfig
from emu35.model.shapes import hf_shapes, parameter_count

GOLDEN = Path(__file__).parents[1] / "golden" / "lm_34b_shapes.json"
EMU35_34B = LMConfig(
    num_layers=64,
    hidden_size=5120,
    ffn_hidden_size=25600,
    num_attention_heads=64,
    num_kv_heads=8,
    head_dim=128,
)
VOCABULARY_SIZE = 282_926


@pytest.mark.golden
def test_34b_names_and_shapes_equal_the_released_ones() -> None:
    golden = json.loads(GOLDEN.read_text())
    expected = {}
    for name, shape in golden["layer0_and_globals"].items():
        copies = range(64) if ".layers.0." in name else [0]
        for layer in copies:
            expected[name.replace(".layers.0.", f".layers.{layer}.")] = tuple(shape)
    shapes = hf_shapes(EMU35_34B, vocabulary_size=VOCABULARY_SIZE)
    assert shapes == expected
    assert len(shapes) == golden["n_tensors"] == 707


@pytest.mark.golden
def test_34b_parameter_count() -> None:
    golden = json.loads(GOLDEN.read_text())
    count = parameter_count(EMU35_34B, vocabulary_size=VOCABULARY_SIZE)
    assert count == golden["total_params"] == 34_103_460_864


def test_attention_width_may_differ_from_hidden_size() -> None:
    config = LMConfig(
        num_layers=1,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=32,
    )
    shapes = hf_shapes(config, vocabulary_size=10)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (128, 64)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (64, 128)
    assert parameter_count(config, vocabulary_size=20) - parameter_count(
        config, vocabulary_size=10
    ) == (2 * 10 * 64)


def test_shapes_need_no_torch() -> None:
    code = "import sys, emu35.model.shapes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
