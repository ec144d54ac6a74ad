"""The written-out gradient against autograd's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from emu35.model.swiglu import SwiGLU

ACTIVATION_CONFIG: Any = None  # it reads nothing from it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swiglu_equals_silu_times_up_forward_and_backward(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 2, 24, generator=generator).mul(3).to(dtype)
    grad = torch.randn(5, 2, 12, generator=generator).to(dtype)
    ours, plain = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    output = SwiGLU(ACTIVATION_CONFIG)(ours)
    gate, up = plain.chunk(2, -1)
    expected = F.silu(gate) * up
    output.backward(grad)
    expected.backward(grad)
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=tolerance, atol=tolerance)


def test_swiglu_passes_gradcheck() -> None:
    inputs = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SwiGLU(ACTIVATION_CONFIG), (inputs,))
