import pytest
import torch

from emu35.model.norm import rms_norm


def plain(hidden: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """The formula as written, for autograd to differentiate."""
    wide = hidden.float()
    scaled = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled.to(hidden.dtype) * weight_H


@pytest.mark.parametrize("shape", [(5, 2, 48), (3, 2, 4, 32), (7, 16)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_value_and_gradients_equal_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(shape, generator=generator)
    weight_H = 1 + 0.3 * torch.randn(shape[-1], generator=generator)
    upstream = torch.randn(shape, generator=generator).to(dtype)
    results: list[list[torch.Tensor]] = []
    for function in (
        lambda x, w: rms_norm(x, weight_H=w, eps=1e-6),
        lambda x, w: plain(x, w, 1e-6),
    ):
        inputs = [hidden.to(dtype).requires_grad_(), weight_H.to(dtype).requires_grad_()]
        value = function(*inputs)
        results.append([value, *torch.autograd.grad(value, inputs, upstream)])
    for ours, oracle in zip(*results, strict=True):
        assert ours.dtype == oracle.dtype == dtype
        scale = oracle.float().abs().max().item()
        torch.testing.assert_close(ours.float(), oracle.float(), rtol=0, atol=tolerance * scale)


def test_a_row_of_zeros_stays_zero_and_gets_a_finite_gradient() -> None:
    hidden = torch.zeros(2, 8, requires_grad=True)
    weight_H = torch.ones(8, requires_grad=True)
    value = rms_norm(hidden, weight_H=weight_H, eps=1e-6)
    value.backward(torch.ones_like(value))
    assert not value.any()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_the_input_is_left_alone() -> None:
    hidden = torch.randn(4, 8)
    before = hidden.clone()
    rms_norm(hidden, weight_H=torch.full((8,), 2.0), eps=1e-6)
    assert torch.equal(hidden, before)
