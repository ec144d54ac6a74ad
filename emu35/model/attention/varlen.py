"""Variable-length flash attention for plain causal documents: torch's own kernels, or those of
transformer-engine. CUDA and bf16; documents are told apart by their cumulative lengths."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from emu35.model.context import AttentionContext
from emu35.model.mask import AttentionMask


@dataclass(kw_only=True, slots=True, frozen=True)
class Documents:
    """All rows of a micro-batch, laid end to end, as documents.

    Attributes:
        ends_N: cumulative lengths from 0, int32.
        longest: length of the longest document.
        empty_T: rows that see nothing (padding, which counts as documents of its own here), or None
            where there are none.
    """

    ends_N: torch.Tensor
    longest: int
    empty_T: torch.Tensor | None


def attend_flash(
    query_BHSD: torch.Tensor,
    *,
    key_BGKD: torch.Tensor,
    value_BGKD: torch.Tensor,
    context: AttentionContext,
    dropout: float = 0.0,
) -> torch.Tensor:
    """``torch.nn.attention.varlen``; attention output [B, H, S, D], zero for padding."""
    from torch.nn.attention.varlen import varlen_attn

    assert dropout == 0.0, "refused when the model was built"
    documents = _documents_of(context, device=query_BHSD.device)
    output_THD: Any = varlen_attn(
        _laid_out(query_BHSD),
        _laid_out(key_BGKD),
        _laid_out(value_BGKD),
        documents.ends_N,
        documents.ends_N,
        documents.longest,
        documents.longest,
        window_size=(-1, 0),  # causal
        enable_gqa=query_BHSD.shape[1] != key_BGKD.shape[1],
    )
    return _erased(output_THD, documents=documents, like=query_BHSD)


def attend_te(
    query_BHSD: torch.Tensor,
    *,
    key_BGKD: torch.Tensor,
    value_BGKD: torch.Tensor,
    context: AttentionContext,
    dropout: float = 0.0,
) -> torch.Tensor:
    """``transformer_engine.pytorch.DotProductAttention``; as :func:`attend_flash`."""
    documents = _documents_of(context, device=query_BHSD.device)
    module = _te_module(query_BHSD.shape[1], key_BGKD.shape[1], query_BHSD.shape[3], dropout)
    output_TE = module(
        _laid_out(query_BHSD),
        _laid_out(key_BGKD),
        _laid_out(value_BGKD),
        cu_seqlens_q=documents.ends_N,
        cu_seqlens_kv=documents.ends_N,
        max_seqlen_q=documents.longest,
        max_seqlen_kv=documents.longest,
    )
    heads = query_BHSD.shape[1]
    output_THD = output_TE.view(output_TE.shape[0], heads, -1)
    return _erased(output_THD, documents=documents, like=query_BHSD)


def find_documents(mask: AttentionMask) -> Documents:
    """The documents of a plain causal mask, on the CPU.

    Raises:
        ValueError: a row sees something else than its document up to itself.
    """
    start_BS, end_BS = mask.start1_BS.cpu(), mask.end1_BS.cpu()
    rows_S = torch.arange(start_BS.shape[1])
    empty_BS = end_BS <= start_BS
    plain_BS = (end_BS == rows_S + 1) & (mask.end2_BS <= mask.start2_BS).cpu()
    if not (plain_BS | empty_BS).all():
        raise ValueError("the mask is not plain causal within documents; use segment or flex")
    begins_BS = torch.ones_like(empty_BS)
    same = (start_BS[:, 1:] == start_BS[:, :-1]) | (empty_BS[:, 1:] & empty_BS[:, :-1])
    begins_BS[:, 1:] = ~same | (empty_BS[:, 1:] != empty_BS[:, :-1])
    bounds = [*begins_BS.flatten().nonzero().squeeze(1).tolist(), begins_BS.numel()]
    ends_N = torch.tensor(bounds, dtype=torch.int32)
    return Documents(
        ends_N=ends_N,
        longest=int(ends_N.diff().max()),
        empty_T=empty_BS.flatten() if empty_BS.any() else None,
    )


def _documents_of(context: AttentionContext, *, device: torch.device) -> Documents:
    if "documents" not in context.derived:
        assert context.mask is not None
        found = find_documents(context.mask)
        context.derived["documents"] = Documents(
            ends_N=found.ends_N.to(device),
            longest=found.longest,
            empty_T=None if found.empty_T is None else found.empty_T.to(device),
        )
    return context.derived["documents"]


def _laid_out(states_BHSD: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] -> [B * S, H, D]."""
    return states_BHSD.transpose(1, 2).flatten(0, 1).contiguous()


def _erased(output_THD: torch.Tensor, *, documents: Documents, like: torch.Tensor) -> torch.Tensor:
    """Padding set to zero, and back to [B, H, S, D]."""
    if documents.empty_T is not None:
        output_THD = output_THD.masked_fill(documents.empty_T[:, None, None], 0.0)
    return output_THD.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


@lru_cache(maxsize=8)
def _te_module(heads: int, groups: int, head_dim: int, dropout: float) -> Any:
    import transformer_engine.pytorch as te  # type: ignore[import-not-found]

    return te.DotProductAttention(
        heads,
        head_dim,
        num_gqa_groups=groups,
        attention_dropout=dropout,
        qkv_format="thd",
        attn_mask_type="padding_causal",
    )
