"""RMSNorm with its gradient written out (arXiv 1910.07467).

mcore's own refuses sequence parallelism. Autograd over the formula keeps three tensors of the
input's size for backward and walks through memory a dozen times; this keeps the input and one
number a row.
"""

from typing import Any

import torch

from emu35.parallel import cpu

cpu.install()

from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


class RMSNorm(torch.nn.Module):
    """RMSNorm as the released model computes it: in fp32, cast back, then times the weight."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        if torch.cuda.is_available():
            self.weight.data = self.weight.data.to(torch.cuda.current_device())
        # finalize_model_grads sums the gradients of parameters with this mark over TP ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        return rms_norm(hidden, weight_H=self.weight, eps=self.eps)


def rms_norm(hidden: torch.Tensor, *, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in fp32, cast back, times the weight."""
    return _RMSNorm.apply(hidden, weight_H, eps)  # type: ignore[return-value]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        wide = hidden.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = length.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight_H, inverse)
        return (wide * inverse).to(hidden.dtype).mul_(weight_H)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight_H, inverse = ctx.saved_tensors
        grad, wide_weight_H = grads[0].float(), weight_H.float()
        normed = hidden.float() * inverse
        product = grad * normed
        grad_weight_H = None
        if ctx.needs_input_grad[1]:
            grad_weight_H = product.flatten(0, -2).sum(0).to(weight_H.dtype)
        # With n the normed row: dx = (w g - n mean(w g n)) / rms.
        # Flattened, or torch would make a batch of products of it where the weight is frozen.
        sums = torch.mv(product.flatten(0, -2), wide_weight_H).view(product.shape[:-1])
        mean = sums.div_(hidden.shape[-1]).unsqueeze_(-1)
        grad_hidden = torch.mul(grad, wide_weight_H, out=product)
        grad_hidden.addcmul_(normed, mean, value=-1.0).mul_(inverse)
        return grad_hidden.to(hidden.dtype), grad_weight_H, None
