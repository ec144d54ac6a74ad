"""The sizes of Qwen3 as the transformers library builds them, without a weight."""

import pytest
import torch

from emu35.config import LMConfig
from emu35.model.shapes import hf_shapes, parameter_count
from emu35.run.compose import compose

# arXiv 2505.09388, Table 1, and the config.json of each model: layers, widths, heads, tied or not.
SIZES = {
    "emu35_0_6b": (28, 1024, 3072, 16, True, 596_049_920),
    "emu35_1_7b": (28, 2048, 6144, 16, True, 1_720_574_976),
    "emu35_4b": (36, 2560, 9728, 32, True, 4_022_468_096),
    "emu35_8b": (36, 4096, 12288, 32, False, 8_190_735_360),
    "emu35_14b": (40, 5120, 17408, 40, False, 14_768_307_200),
    "emu35_34b": (64, 5120, 25600, 64, False, 32_762_123_264),
}
ROWS = 151_936


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    layers, hidden, ffn, heads, tied, count = SIZES[name]
    with torch.device("meta"):
        theirs = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                vocab_size=ROWS,
                hidden_size=hidden,
                intermediate_size=ffn,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=8,
                head_dim=128,
                tie_word_embeddings=tied,
            )
        )
    # Tied weights count once.
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count
    model = compose([f"model={name}", "tokenizer=emu35"]).model
    assert isinstance(model, LMConfig)
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert hf_shapes(model, vocabulary_size=ROWS) == expected
    assert parameter_count(model, vocabulary_size=ROWS) == count + tied * ROWS * hidden
    assert model.max_position_embeddings == 32768
    assert (model.rope_theta, model.rms_norm_eps) == (1e6, 1e-6)
