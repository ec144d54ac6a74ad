"""Rotary position embedding by explicit positions (arXiv 2104.09864, half-split layout).

mcore's own rotary ignores position ids, while packed documents restart their positions and DiDA's
noisy copies repeat those of the clean image; so the rotation happens inside the core attention.
"""

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
    first, second = states_SBND.chunk(2, -1)
    swapped_SBND = torch.cat([-second, first], -1)
    return torch.addcmul(states_SBND * cos_SB1D, swapped_SBND, sin_SB1D)
