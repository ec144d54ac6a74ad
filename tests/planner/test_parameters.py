"""Parameter counts by formula, against the golden tensor lists and against real modules."""

import json
from math import prod
from pathlib import Path

import pytest

from emu35.config import IBQConfig, LMConfig, ParallelConfig
from emu35.planner.parameters import count_parameters, rank_parameters
from emu35.run.compose import compose

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.golden
def test_34b_is_exact():
    config = compose(["experiment=emu35_34b/pretrain_s1"])
    assert count_parameters(config.model, vocabulary_size=282_926) == 34_103_460_864


@pytest.mark.golden
def test_ibq_is_exact():
    assert count_parameters(IBQConfig(), vocabulary_size=0) == 455_336_963


@pytest.mark.parametrize(
    "config",
    [
        IBQConfig(
            ch=32, ch_mult=[1, 1, 2], num_res_blocks=1, z_channels=16, embed_dim=8, n_embed=64
        ),
        IBQConfig(ch=32, ch_mult=[1, 2, 2], attn_resolutions=[64, 32], resolution=128, n_embed=8),
        IBQConfig(ch=64, ch_mult=[2, 1], num_res_blocks=2, attn_resolutions=[], n_embed=8),
    ],
)
def test_ibq_formula_counts_what_the_module_has(config: IBQConfig):
    torch = pytest.importorskip("torch")
    from emu35.vision.ibq.model import IBQ

    with torch.device("meta"):
        module = IBQ(config)
    expected = sum(parameter.numel() for parameter in module.parameters())
    assert count_parameters(config, vocabulary_size=0) == expected


def test_one_rank_holds_everything():
    model = LMConfig()
    held = rank_parameters(model, vocabulary_size=999, parallel=ParallelConfig())
    assert held.total == count_parameters(model, vocabulary_size=999)
    assert held.layers == model.num_layers


def test_tensor_parallel_ranks_share_matrices_and_repeat_vectors():
    shapes = json.loads((GOLDEN / "lm_34b_shapes.json").read_text())["layer0_and_globals"]
    model = compose(["model=emu35_34b"]).model
    assert isinstance(model, LMConfig)
    held = rank_parameters(model, vocabulary_size=282_926, parallel=ParallelConfig(tp=8))
    expected = 0
    for name, shape in shapes.items():
        if "embed_tokens" in name or "lm_head" in name:
            expected += -(-shape[0] // 8) * shape[1]  # padded to whole rows a rank
        else:
            copies = 64 if ".layers.0." in name else 1
            expected += copies * (prod(shape) if len(shape) == 1 else prod(shape) // 8)
    assert held.total == expected


def test_the_fullest_pipeline_stage_is_the_last():
    model = LMConfig(num_layers=4)
    whole = count_parameters(model, vocabulary_size=100)
    embedding = 100 * model.hidden_size
    held = rank_parameters(model, vocabulary_size=100, parallel=ParallelConfig(pp=2))
    layers = whole - 2 * embedding - model.hidden_size
    assert held.total == layers // 2 + embedding + model.hidden_size
    assert held.layers == 2
