"""Attention of new tokens over a cache: exact, sequence by sequence, without padding.

Every sequence attends to its own slots alone, so what else is in the batch changes neither the
result nor the cost. A single new token sees all keys of its sequence: the queries that share a
key-value head are then rows of one small product, and no mask is needed.
"""

import torch
import torch.nn.functional as F

from emu35.model.cache import CachedForward, Span


def attend(
    query_HSD: torch.Tensor,
    *,
    key_GSD: torch.Tensor,
    value_GSD: torch.Tensor,
    forward: CachedForward,
    layer: int,
) -> torch.Tensor:
    """Write the keys and values of ``layer``, then attend; output [H, S, D]."""
    key_GLD, value_GLD = forward.write(layer=layer, key_GSD=key_GSD, value_GSD=value_GSD)
    parts: list[torch.Tensor] = []
    row = 0
    for span in forward.spans:
        end = span.start + span.length + span.count
        parts.append(
            _one(
                query_HSD[:, row : row + span.count],
                key_GKD=key_GLD[:, span.start : end],
                value_GKD=value_GLD[:, span.start : end],
                span=span,
            )
        )
        row += span.count
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _one(
    query_HCD: torch.Tensor, *, key_GKD: torch.Tensor, value_GKD: torch.Tensor, span: Span
) -> torch.Tensor:
    if span.count == 1:
        grouped_GRD = query_HCD.reshape(key_GKD.shape[0], -1, query_HCD.shape[-1])
        output_1GRD = F.scaled_dot_product_attention(
            grouped_GRD[None], key_GKD[None], value_GKD[None]
        )
        return output_1GRD.reshape(query_HCD.shape)
    visible_CK = None
    whole = span.causal and span.length == 0
    if span.causal and not whole:
        ones_CK = torch.ones(
            span.count, key_GKD.shape[1], dtype=torch.bool, device=query_HCD.device
        )
        visible_CK = ones_CK.tril_(span.length)
    return F.scaled_dot_product_attention(
        query_HCD[None],
        key_GKD[None],
        value_GKD[None],
        attn_mask=visible_CK,
        is_causal=whole,
        enable_gqa=query_HCD.shape[0] != key_GKD.shape[0],
    )[0]
