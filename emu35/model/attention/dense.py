"""The oracle: scaled dot-product attention under the boolean matrix of the interval mask."""

import torch
import torch.nn.functional as F

from emu35.model.context import AttentionContext


def attend(
    query_BHSD: torch.Tensor,
    *,
    key_BGKD: torch.Tensor,
    value_BGKD: torch.Tensor,
    context: AttentionContext,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention output [B, H, S, D]; rows that see nothing come out as zero."""
    visible_B1SK, empty_B1S1 = _matrix(context, num_keys=key_BGKD.shape[2], device=key_BGKD.device)
    output_BHSD = F.scaled_dot_product_attention(
        query_BHSD,
        key_BGKD,
        value_BGKD,
        attn_mask=visible_B1SK,
        dropout_p=dropout,
        enable_gqa=query_BHSD.shape[1] != key_BGKD.shape[1],
    )
    return output_BHSD if empty_B1S1 is None else output_BHSD.masked_fill(empty_B1S1, 0.0)


def _matrix(
    context: AttentionContext, *, num_keys: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    key = ("dense", num_keys)
    if key not in context.derived:
        assert context.mask is not None
        visible_B1SK = context.mask.to(device).dense(num_keys)[:, None]
        empty_B1S1 = ~visible_B1SK.any(-1, keepdim=True)
        if empty_B1S1.any():
            # A softmax over nothing is NaN, in the gradient too; let such a row see everything
            # and erase its output afterwards, which also cuts its gradient.
            context.derived[key] = visible_B1SK | empty_B1S1, empty_B1S1
        else:
            context.derived[key] = visible_B1SK, None
    return context.derived[key]
