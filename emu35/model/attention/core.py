"""The core attention module of every transformer layer: rotary, exchange or cache, backend."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch

from emu35.config import AttentionBackend
from emu35.config.parallel import CPCommType
from emu35.model.attention import cached, dense, flex, segment, varlen
from emu35.model.context import AttentionContext
from emu35.model.rotary import rotary_tables, rotate
from emu35.parallel import cpu

cpu.install()

from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


class Attend(Protocol):
    """What a backend is: attention over [B, heads, S or K, D] under the context's mask."""

    def __call__(
        self,
        query_BHSD: torch.Tensor,
        *,
        key_BGKD: torch.Tensor,
        value_BGKD: torch.Tensor,
        context: AttentionContext,
        dropout: float = 0.0,
    ) -> torch.Tensor: ...


BACKENDS: Mapping[AttentionBackend, Attend] = {
    AttentionBackend.segment: segment.attend,
    AttentionBackend.dense: dense.attend,
    AttentionBackend.flex: flex.attend,
    AttentionBackend.flash: varlen.attend_flash,
    AttentionBackend.te: varlen.attend_te,
}
"""What each can do stands in :mod:`emu35.model.attention.support`. Tokens that extend
a cache go through :mod:`emu35.model.attention.cached` instead."""


class CoreAttention(MegatronModule):
    """Takes queries and keys after QK-norm, rotates them by the context's positions, fetches what
    other context-parallel ranks or the cache hold, and attends. Instantiated by mcore's
    SelfAttention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object = None,
        backend: AttentionBackend = AttentionBackend.segment,
        rope_theta: float = 1e6,
        first_layer: int = 1,
    ) -> None:
        super().__init__(config=config)
        # mcore hands every core attention the same arguments; these mean nothing here.
        del attn_mask_type, attention_type, softmax_scale, cp_comm_type, pg_collection
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cache_layer = layer_number - first_layer
        self.attend = BACKENDS[backend]
        self.rope_theta = rope_theta

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object = None,
        attn_mask_type: object = None,
        attention_bias: object = None,
        packed_seq_params: AttentionContext | None = None,
    ) -> torch.Tensor:
        """Queries [S, B, H, D], keys and values [S, B, G, D] -> output [S, B, H * D]."""
        del attention_mask, attn_mask_type, attention_bias
        context = packed_seq_params
        assert isinstance(context, AttentionContext), "the model is called with an AttentionContext"
        cos_SB1D, sin_SB1D = rotary_tables(
            context, head_dim=query.shape[-1], theta=self.rope_theta, dtype=query.dtype
        )
        query_SBHD = rotate(query, cos_SB1D=cos_SB1D, sin_SB1D=sin_SB1D)
        key_SBGD = rotate(key, cos_SB1D=cos_SB1D, sin_SB1D=sin_SB1D)
        split = context.split
        if split is not None and split.kind is CPCommType.a2a:
            query_SBHD, key_SBGD, value = map(split.scatter_heads, (query_SBHD, key_SBGD, value))
        elif split is not None:
            key_SBGD, value = split.gather_keys(key_SBGD, value)
        steps, batch = query.shape[:2]
        if context.cache is not None:
            assert batch == 1, "cached tokens come as one row"
            output_HSD = cached.attend(
                query_SBHD[:, 0].transpose(0, 1),
                key_GSD=key_SBGD[:, 0].transpose(0, 1),
                value_GSD=value[:, 0].transpose(0, 1),
                forward=context.cache,
                layer=self.cache_layer,
            )
            return output_HSD.transpose(0, 1).reshape(steps, 1, -1)
        key_BGKD, value_BGKD = key_SBGD.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        dropout = self.dropout if self.training else 0.0
        with self._dropout_rng(dropout):
            output_BHSD = self.attend(
                query_SBHD.permute(1, 2, 0, 3),
                key_BGKD=key_BGKD,
                value_BGKD=value_BGKD,
                context=context,
                dropout=dropout,
            )
        output_SBHD = output_BHSD.permute(2, 0, 1, 3)
        if split is not None and split.kind is CPCommType.a2a:
            output_SBHD = split.gather_heads(output_SBHD)
        return output_SBHD.reshape(steps, batch, -1)

    def _dropout_rng(self, dropout: float) -> Any:
        """Heads are split over tensor-parallel ranks, so each rank draws its own dropout."""
        if dropout == 0.0 or self.config.sequence_parallel:
            # Under sequence parallelism mcore's attention already forks the tracker.
            return nullcontext()
        tracker: Any = tensor_parallel.get_cuda_rng_tracker()
        return tracker.fork()
