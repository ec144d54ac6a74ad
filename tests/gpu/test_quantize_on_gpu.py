"""Eight-bit weights on a GPU, and FP8 products there."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_lm

from emu35.config import Precision
from emu35.model.build import build_model
from emu35.model.context import AttentionContext
from emu35.model.init import initialize
from emu35.model.logits import vocabulary_logits
from emu35.model.mask import AttentionMask
from emu35.model.quantize import (
    Quantization,
    quantizable,
    quantize_linears,
    require_quantization,
    weight_bytes,
)
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import single_process_mesh

pytestmark = pytest.mark.gpu

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))

LM = tiny_lm(hidden_size=256, ffn_hidden_size=512, head_dim=32, init_std=0.05)
BOUND = {
    Quantization.int8_weights: 0.04,
    Quantization.fp8_weights: 0.15,
    Quantization.fp8_dynamic: 0.2,
}


def built(how: Quantization | None) -> Emu35Model:
    single_process_mesh()
    model = build_model(LM, vocabulary_size=300, precision=Precision.bf16)
    initialize(model, seed=3, pad_id=0)
    model.eval().requires_grad_(False)
    if how is not None:
        require_quantization(how, config=LM, precision=Precision.bf16, tp=1)
        quantize_linears(model, how=how)
    return model


@torch.no_grad()
def logits(model: Emu35Model) -> torch.Tensor:
    tokens_BS = ((torch.arange(64, device="cuda") * 37 + 5) % 300)[None]
    context = AttentionContext(
        positions_BS=torch.arange(64, device="cuda")[None],
        mask=AttentionMask.causal(torch.zeros_like(tokens_BS)),
    )
    hidden_SBH = model(tokens_BS, context=context)
    return vocabulary_logits(model, hidden_NH=hidden_SBH[:, 0]).float()


@pytest.mark.parametrize("how", list(Quantization))
def test_logits_stay_close_and_weights_get_small(how: Quantization) -> None:
    pytest.importorskip("torchao")
    if how is Quantization.fp8_dynamic and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply in FP8")
    whole, small = built(None), built(how)
    expected, found = logits(whole), logits(small)
    gap = float((found - expected).norm() / expected.norm())
    assert 0 < gap < BOUND[how]
    numbers = sum(linear.weight.numel() for linear in quantizable(whole).values())
    assert weight_bytes(whole) - weight_bytes(small) > 0.95 * numbers


def test_dynamic_products_equal_those_of_values_rounded_by_hand() -> None:
    """Weights by output channel and activations by token, both to e4m3, each with its scale in
    the type that it comes in."""
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply in FP8")

    def rounded(values: torch.Tensor) -> torch.Tensor:
        scale = (values.abs().amax(dim=-1, keepdim=True) / 448).float()
        return (values.float() / scale).to(torch.float8_e4m3fn).float() * scale

    whole = quantizable(built(None))
    for name, linear in quantizable(built(Quantization.fp8_dynamic)).items():
        weight_OI = whole[name].weight
        x_SBI = torch.randn(8, 2, weight_OI.shape[1], device="cuda", dtype=torch.bfloat16)
        expected = rounded(x_SBI) @ rounded(weight_OI).t()
        found = linear(x_SBI)[0].float()
        assert float((found - expected).norm() / expected.norm()) < 0.01, name


def test_the_engine_decodes_both_ways_with_fp8_products() -> None:
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply in FP8")
    from denoise_engine import denoise_source, ranks_requests
    from tiny_engine import TOKENIZER, V

    from emu35.inference.lead import build_engine

    single_process_mesh()
    model = build_model(LM, vocabulary_size=V.size, precision=Precision.bf16)
    initialize(model, seed=3, pad_id=V.pad)
    model.eval().requires_grad_(False)
    quantize_linears(model, how=Quantization.fp8_dynamic)
    engine = build_engine(
        model=model, tokenizer=TOKENIZER, source=denoise_source(), max_length=400, max_requests=8
    )
    for request in ranks_requests():
        engine.submit(request)
    answers = engine.run()
    assert len(answers) == len(ranks_requests())
    assert not [problem for answer in answers for problem in answer.document.problems]
