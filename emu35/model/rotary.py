"""Rotary position embedding by explicit positions (arXiv 2104.09864, half-split layout).

mcore's own rotary ignores position ids, while packed documents restart their positions and DiDA's
noisy copies repeat those of the clean image; so the rotation happens inside the core attention.
"""

from typing import Any

import torch

from emu35.model.context import AttentionContext


def rotary_tables(
    context: AttentionContext, *, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, each [S, B, 1, head_dim], computed in fp32 once a forward."""
    key = ("rotary", head_dim, theta, dtype)
    if key not in context.derived:
        assert context.positions_BS is not None
        device = context.positions_BS.device
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        angles_SBF = context.positions_BS.t()[..., None].float() * theta**-exponents
        angles_SB1D = torch.cat([angles_SBF, angles_SBF], -1)[:, :, None]
        context.derived[key] = angles_SB1D.cos().to(dtype), angles_SB1D.sin().to(dtype)
    return context.derived[key]


def rotate(
    states_SBND: torch.Tensor, *, cos_SB1D: torch.Tensor, sin_SB1D: torch.Tensor
) -> torch.Tensor:
    """Rotate queries or keys, [S, B, heads, head_dim]."""
    return _Rotate.apply(states_SBND, cos_SB1D, sin_SB1D)  # type: ignore[return-value]


class _Rotate(torch.autograd.Function):
    """A rotation by an angle; its gradient is the rotation back."""

    @staticmethod
    def forward(
        ctx: Any, states_SBND: torch.Tensor, cos_SB1D: torch.Tensor, sin_SB1D: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos_SB1D, sin_SB1D)
        return _turn(states_SBND, cos_SB1D=cos_SB1D, sin_SB1D=sin_SB1D, sense=1.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos_SB1D, sin_SB1D = ctx.saved_tensors
        turned_SBND = _turn(grads[0], cos_SB1D=cos_SB1D, sin_SB1D=sin_SB1D, sense=-1.0)
        return turned_SBND, None, None


def _turn(
    states_SBND: torch.Tensor, *, cos_SB1D: torch.Tensor, sin_SB1D: torch.Tensor, sense: float
) -> torch.Tensor:
    """Both halves of the last dimension as the two coordinates of a plane; no copy of the input."""
    turned_SBND = states_SBND * cos_SB1D
    first, second = states_SBND.chunk(2, -1)
    sin_first, sin_second = sin_SB1D.chunk(2, -1)
    turned_first, turned_second = turned_SBND.chunk(2, -1)
    turned_first.addcmul_(second, sin_first, value=-sense)
    turned_second.addcmul_(first, sin_second, value=sense)
    return turned_SBND
