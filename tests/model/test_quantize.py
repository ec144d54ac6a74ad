"""Weights of eight bits: their numbers are those of the formulas, and layers compute with them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_lm

from emu35.config import LoRAConfig, Precision
from emu35.errors import ConfigError, LaunchError
from emu35.model import quantize
from emu35.model.build import build_model
from emu35.model.context import AttentionContext
from emu35.model.init import initialize
from emu35.model.logits import vocabulary_logits
from emu35.model.lora import adapted_linears, attach_adapters
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

VOCABULARY = 200
WEIGHT_ONLY = [Quantization.int8_weights, Quantization.fp8_weights]


def by_hand_int8(weight_OI: torch.Tensor) -> torch.Tensor:
    """A symmetric scale an output channel: the widest weight is 127.5 steps."""
    step_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / 127.5
    return (weight_OI * (1 / step_O1)).round().clamp(-128, 127) * step_O1


def by_hand_fp8(weight_OI: torch.Tensor) -> torch.Tensor:
    """The widest weight of an output channel is 448, the largest number of e4m3."""
    scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / 448
    return (weight_OI / scale_O1).to(torch.float8_e4m3fn).float() * scale_O1


BY_HAND: dict[Quantization, Callable[[torch.Tensor], torch.Tensor]] = {
    Quantization.int8_weights: by_hand_int8,
    Quantization.fp8_weights: by_hand_fp8,
}


def built(*, precision: Precision = Precision.fp32, adapters: bool = False) -> Emu35Model:
    single_process_mesh()
    model = build_model(tiny_lm(init_std=0.1), vocabulary_size=VOCABULARY, precision=precision)
    initialize(model, seed=3, pad_id=0)
    if adapters:
        attach_adapters(model, config=LoRAConfig(rank=4, alpha=8.0), noisy_only=True)
        generator = torch.Generator().manual_seed(1)
        for linear in adapted_linears(model).values():
            assert linear.adapter is not None
            for matrix in (linear.adapter.a, linear.adapter.b):
                matrix.data.copy_(torch.randn(matrix.shape, generator=generator) * 0.3)
    return model.eval().requires_grad_(False)


def rewritten(how: Quantization, *, adapters: bool = False) -> Emu35Model:
    """The oracle: the plain model with each weight as the formula leaves it."""
    model = built(adapters=adapters)
    for linear in quantizable(model).values():
        linear.weight.data = BY_HAND[how](linear.weight.data)
    return model


def quantized(how: Quantization, *, adapters: bool = False) -> Emu35Model:
    model = built(adapters=adapters)
    quantize_linears(model, how=how)
    return model


def logits(model: Emu35Model, *, adapted_S: torch.Tensor | None = None) -> torch.Tensor:
    tokens_BS = ((torch.arange(40) * 37 + 5) % VOCABULARY)[None]
    context = AttentionContext(
        positions_BS=torch.arange(40)[None],
        mask=AttentionMask.causal(torch.zeros_like(tokens_BS)),
        adapted_BS=None if adapted_S is None else adapted_S[None],
    )
    with torch.no_grad():
        return vocabulary_logits(model, hidden_NH=model(tokens_BS, context=context)[:, 0])


def relative(found: torch.Tensor, *, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("how", WEIGHT_ONLY)
def test_logits_are_those_of_weights_rounded_by_hand(how: Quantization) -> None:
    found = logits(quantized(how))
    torch.testing.assert_close(found, logits(rewritten(how)), rtol=1e-4, atol=1e-5)
    # Half a step of 127.5 at most, and in e4m3 half a unit of the third digit behind the point.
    bound = {Quantization.int8_weights: 0.02, Quantization.fp8_weights: 0.08}[how]
    assert 0.001 < relative(found, expected=logits(built())) < bound


@pytest.mark.parametrize("how", WEIGHT_ONLY)
def test_no_map_is_further_off_than_its_format(how: Quantization) -> None:
    whole, small = quantizable(built()), quantizable(quantized(how))
    assert len(small) == 8, "four maps in each of two layers"
    x_SBI = torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(0))
    for name, linear in small.items():
        weight_OI = whole[name].weight
        found_OI = linear.weight.dequantize()  # type: ignore[operator]
        torch.testing.assert_close(found_OI, BY_HAND[how](weight_OI), rtol=1e-6, atol=0)
        worst_O1 = weight_OI.abs().amax(dim=1, keepdim=True)
        gap_OI = (found_OI - weight_OI).abs()
        if how is Quantization.int8_weights:
            assert (gap_OI <= worst_O1 / 255 * 1.001).all()
        else:
            # Three digits, and below the smallest normal number steps of 2^-9.
            assert (gap_OI <= torch.maximum(weight_OI.abs() / 16, worst_O1 / 448 / 1024)).all()
        inputs = x_SBI[..., : weight_OI.shape[1]]
        whole_SBO, small_SBO = whole[name](inputs)[0], linear(inputs)[0]
        limit = 1 / 127 if how is Quantization.int8_weights else 1 / 32
        assert relative(small_SBO, expected=whole_SBO) < limit


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("how", WEIGHT_ONLY)
def test_weights_of_the_layers_take_a_byte_each(how: Quantization, precision: Precision) -> None:
    model = built(precision=precision)
    before = weight_bytes(model)
    assert before == sum(p.numel() * p.element_size() for p in model.parameters())
    maps = quantizable(model).values()
    numbers = sum(linear.weight.numel() for linear in maps)
    channels = sum(linear.weight.shape[0] for linear in maps)
    wide = next(model.parameters()).element_size()
    quantize_linears(model, how=how)
    # A scale of four bytes a channel; int8 has a zero point beside it.
    beside = {Quantization.int8_weights: 5, Quantization.fp8_weights: 4}[how]
    assert weight_bytes(model) == before - numbers * (wide - 1) + channels * beside
    storage = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for weight in model.parameters()
        for part in quantize._parts(weight)
    }
    assert sum(storage.values()) == weight_bytes(model), "nothing wider is kept alive"
    dtypes = {weight.dtype for name, weight in model.named_parameters() if "linear" not in name}
    assert dtypes == {next(model.parameters()).dtype}
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("how", WEIGHT_ONLY)
def test_adapters_of_noisy_copies_add_to_quantised_maps(how: Quantization) -> None:
    noisy_S = torch.arange(40) >= 30
    model = quantized(how, adapters=True)
    plain = logits(quantized(how))
    assert torch.equal(logits(model), plain)
    found = logits(model, adapted_S=noisy_S)
    assert torch.equal(found[~noisy_S], plain[~noisy_S])
    assert not torch.allclose(found[noisy_S], plain[noisy_S], rtol=0.1)
    expected = logits(rewritten(how, adapters=True), adapted_S=noisy_S)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", WEIGHT_ONLY)
def test_a_channel_of_zeros_stays_one(how: Quantization) -> None:
    """0 / 0 is a number of e4m3, too."""
    model = built()
    name, linear = next(iter(quantizable(model).items()))
    linear.weight.data[3] = 0
    quantize_linears(model, how=how)
    found_OI = quantizable(model)[name].weight.dequantize()  # type: ignore[operator]
    assert found_OI[3].abs().max() == 0
    assert found_OI.isfinite().all()


@pytest.fixture
def any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies in FP8 on a CPU as well, slowly; torchao asks for a GPU all the same."""
    quantize._torchao()
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda _: None)


@pytest.mark.usefixtures("any_machine")
def test_dynamic_products_are_those_of_values_rounded_by_hand() -> None:
    """Weights by output channel, activations by token; the scale is in their own type."""

    def rounded(values: torch.Tensor) -> torch.Tensor:
        scale = (values.abs().amax(dim=-1, keepdim=True) / 448).float()
        return (values.float() / scale).to(torch.float8_e4m3fn).float() * scale

    def model() -> Emu35Model:
        single_process_mesh()
        # Query, key and value of 4 + 2 * 2 heads have 128 rows, a multiple of the tile.
        config = tiny_lm(init_std=0.1)
        found = build_model(config, vocabulary_size=VOCABULARY, precision=Precision.bf16)
        initialize(found, seed=3, pad_id=0)
        return found.eval().requires_grad_(False)

    small, whole = model(), quantizable(model())
    quantize_linears(small, how=Quantization.fp8_dynamic)
    for name, linear in quantizable(small).items():
        weight_OI = whole[name].weight
        generator = torch.Generator().manual_seed(0)
        x_SBI = torch.randn(9, 2, weight_OI.shape[1], generator=generator).bfloat16()
        x_SBI[4] = 0
        expected = rounded(x_SBI.where(x_SBI != 0, 1e-9)) @ rounded(weight_OI).t()
        found = linear(x_SBI)[0].float()
        # What is left is the type of the result.
        assert relative(found, expected=expected) < 0.003, name
        assert found[4].abs().max() == 0
    gap = relative(logits(small).float(), expected=logits(model()).float())
    assert 0.005 < gap < 0.25


def required(how: Quantization, *, hidden: int = 32, precision: Precision = Precision.bf16) -> None:
    require_quantization(how, config=tiny_lm(hidden_size=hidden), precision=precision, tp=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU cannot do")
def test_what_needs_a_gpu_is_refused_without_one() -> None:
    with pytest.raises(LaunchError, match="fp8_dynamic needs a CUDA device; fp8_weights and int8"):
        required(Quantization.fp8_dynamic)
    for how in WEIGHT_ONLY:
        required(how, hidden=36, precision=Precision.fp32)


def test_what_fp8_products_cannot_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(LaunchError, match=r"8\.9 or more, and this one has 8\.0"):
        required(Quantization.fp8_dynamic)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    required(Quantization.fp8_dynamic)
    with pytest.raises(ConfigError, match="in fp32; add --precision bf16"):
        required(Quantization.fp8_dynamic, precision=Precision.fp32)
    with pytest.raises(ConfigError, match="in tiles of 16, but hidden_size is 36; use fp8_weights"):
        required(Quantization.fp8_dynamic, hidden=36)
    config = replace(tiny_lm(), ffn_hidden_size=48)
    with pytest.raises(ConfigError, match="ffn_hidden_size / tp is 24"):
        require_quantization(
            Quantization.fp8_dynamic, config=config, precision=Precision.bf16, tp=2
        )


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"pip install 'emu35\[quantize\]'"):
        required(Quantization.int8_weights)
