"""SwiGLU over the fused gate and up projection, with its gradient written out (arXiv 2002.05202).

Autograd would keep the gate's activation as well and join two halves of the gradient by a copy;
this keeps the input alone and writes each half of the gradient where it belongs.
"""

from typing import Any

import torch
import torch.nn.functional as F

from emu35.parallel import cpu

cpu.install()

from megatron.core.transformer.module import MegatronModule  # noqa: E402


class SwiGLU(MegatronModule):
    """silu(gate) * up, where the last dimension of the input is [gate; up]. Constructed with the
    transformer's configuration alone, as mcore does for the activation of a spec; it has no
    parameters, but mcore asks every part of an MLP for its (empty) sharded state."""

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[..., 2F] -> [..., F]."""
        return _SwiGLU.apply(gate_up)  # type: ignore[return-value]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        (grad,) = grads
        gate, up = gate_up.chunk(2, -1)
        result = torch.empty_like(gate_up)
        grad_gate, grad_up = result.chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        torch.mul(grad, silu, out=grad_up)
        # d silu / d gate = sigmoid * (1 + gate - silu)
        slope = silu.neg_().add_(gate).add_(1.0).mul_(sigmoid)
        torch.mul(grad, up, out=grad_gate).mul_(slope)
        return result
