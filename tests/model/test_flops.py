"""Model FLOPs against a count by hand and against torch's own counter."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from emu35.config import AttentionBackend, LMConfig, LoRAConfig, ParallelConfig
from emu35.model.build import build_model
from emu35.model.context import AttentionContext
from emu35.model.flops import matrix_weights, step_flops
from emu35.model.init import initialize
from emu35.model.lora import train_adapters
from emu35.model.mask import AttentionMask
from emu35.model.shapes import adapter_count
from emu35.parallel.mesh import init_mesh

SMALL = LMConfig(
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=32,
    attention_backend=AttentionBackend.dense,
)
VOCABULARY = 50


def test_a_count_by_hand() -> None:
    tiny = LMConfig(
        num_layers=1,
        hidden_size=2,
        ffn_hidden_size=3,
        num_attention_heads=2,
        num_kv_heads=1,
        head_dim=2,
    )
    # q 2x4, k and v 2x2 each, output 4x2; gate, up and down 2x3 each; logits 2x5.
    weights = 8 + 4 + 4 + 8 + 3 * 6 + 10
    assert matrix_weights(tiny, vocabulary_size=5) == weights
    # Documents of 3 and 2 tokens: 6 + 3 pairs, each 2 heads x 2 numbers for score and value.
    expected = 6 * weights * 5 + 3 * (6 + 3) * 2 * (2 * 2 + 2 * 2)
    found = step_flops(tiny, vocabulary_size=5, tokens=5, visible_pairs=9)
    assert found == expected


def test_the_paper_s_model_costs_about_six_flops_a_parameter() -> None:
    large = LMConfig(
        num_layers=64,
        hidden_size=5120,
        ffn_hidden_size=25600,
        num_attention_heads=64,
        num_kv_heads=8,
        head_dim=128,
    )
    weights = matrix_weights(large, vocabulary_size=282926)
    assert weights == pytest.approx(32.7e9, rel=0.01)  # 34.1e9 less the input embedding
    length = 32768
    attention = step_flops(
        large, vocabulary_size=282926, tokens=0, visible_pairs=length * (length + 1) / 2
    )
    assert attention / (6 * weights * length) == pytest.approx(0.52, abs=0.02)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=3)], ids=["all", "adapters"])
def test_torch_counts_the_same_forward_and_backward(lora: LoRAConfig | None) -> None:
    """The dense backend computes every pair, masked or not, so that is what the count gets."""
    init_mesh(ParallelConfig(), seed=0)
    model = build_model(SMALL, vocabulary_size=VOCABULARY)
    initialize(model, seed=0, pad_id=0)
    if lora is not None:
        train_adapters(model, config=lora, seed=0)
    batch, length = 2, 32
    tokens_BS = torch.randint(0, VOCABULARY, (batch, length))
    context = AttentionContext(
        positions_BS=torch.arange(length).expand(batch, length),
        mask=AttentionMask.causal(torch.zeros(batch, length, dtype=torch.long)),
    )
    # torch does not count its fused attention on a CPU, only the products it stands for.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden_SBH = model(tokens_BS, context=context)
        weight_VH = model.output_layer.weight
        assert weight_VH is not None
        F.linear(hidden_SBH, weight_VH).sum().backward()
    expected = step_flops(
        SMALL,
        vocabulary_size=VOCABULARY,
        tokens=batch * length,
        visible_pairs=batch * length * length,
        adapters=adapter_count(SMALL, lora=lora) if lora else None,
    )
    assert counter.get_total_flops() == expected
