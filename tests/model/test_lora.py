"""One linear map with an adapter against W + scale B A in fp64, and what a chunk does with them."""

import pytest
import torch
from test_fused_layers import MODEL, build, hidden_of, stand_in

from emu35.config import LayerSpec, LoRAConfig, LoRATarget
from emu35.errors import ConfigError
from emu35.model.lora import (
    adapted_linears,
    attach_adapters,
    merge_adapters,
    train_adapters,
    without_adapters,
)
from emu35.model.shapes import adapter_count
from emu35.model.transformer import Emu35Model

__all__ = ["stand_in"]
LORA = LoRAConfig(rank=5, alpha=15.0)
SCALE = 3.0


def adapted(*, seed: int = 1, config: LoRAConfig = LORA) -> Emu35Model:
    """With B drawn, which training begins with as zero."""
    model = build(LayerSpec.local, seed=seed)
    train_adapters(model, config=config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for linear in adapted_linears(model).values():
        assert linear.adapter is not None
        linear.adapter.b.data.normal_(0.0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("target", list(LoRATarget))
def test_forward_and_gradients_are_those_of_the_sum_in_fp64(target: LoRATarget) -> None:
    linears = adapted_linears(adapted())
    linear = linears[next(name for name in linears if name.endswith(target))]
    assert linear.adapter is not None
    assert linear.weight is not None
    a, b, weight = linear.adapter.a, linear.adapter.b, linear.weight
    x_SBI = torch.randn(7, 2, weight.shape[1], requires_grad=True)
    output, _ = linear(x_SBI)
    pull = torch.randn_like(output)
    (output * pull).sum().backward()

    wide = [tensor.detach().double().requires_grad_() for tensor in (x_SBI, a, b)]
    whole = weight.detach().double() + SCALE * wide[2] @ wide[1]
    expected = wide[0] @ whole.t()
    (expected * pull.double()).sum().backward()
    assert (output.double() - expected).norm() < 1e-6 * expected.norm()
    for ours, theirs in zip((x_SBI, a, b), wide, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad.double() - theirs.grad).norm() < 1e-6 * theirs.grad.norm()
    assert weight.grad is None


def test_only_adapters_are_trained_and_merging_leaves_the_plain_model() -> None:
    model = adapted()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".adapter." in name}
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert numbers == adapter_count(MODEL, lora=LORA)
    with_adapters = hidden_of(model)
    with without_adapters(model):
        base = hidden_of(model)
        assert torch.equal(base, hidden_of(build(LayerSpec.local, seed=1)))
    assert torch.equal(hidden_of(model), with_adapters)
    merge_adapters(model)
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in build(LayerSpec.local, seed=1).named_parameters()}
    merged = hidden_of(model)
    torch.testing.assert_close(merged, with_adapters, rtol=1e-5, atol=1e-5)
    assert (merged - base).abs().max() > 0.01


def test_dropout_thins_out_the_addition_and_not_the_base() -> None:
    model = adapted(config=LoRAConfig(rank=5, alpha=15.0, dropout=0.5))
    (linear, *_) = adapted_linears(model).values()
    assert linear.weight is not None
    x_SBI = torch.randn(64, 2, linear.weight.shape[1])
    with torch.no_grad(), without_adapters(model):
        base = linear(x_SBI)[0]
    with torch.no_grad():
        plain = linear.eval()(x_SBI)[0] - base
        drawn = torch.stack([linear.train()(x_SBI)[0] - base for _ in range(200)])
    assert not torch.equal(drawn[0], drawn[1])
    error = (drawn.mean(0) - plain).norm() / plain.norm()
    assert error < 3 * drawn.std(0).norm() / 200**0.5 / plain.norm()


@pytest.mark.usefixtures("stand_in")
def test_fused_layers_have_no_place_for_an_adapter() -> None:
    model = build(LayerSpec.te, seed=1)
    with pytest.raises(ConfigError, match=r"use engine\.layers=local, or export the adapted run"):
        attach_adapters(model, config=LORA)
