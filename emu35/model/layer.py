"""The transformer layer: mcore's, which passes on to its adapters what the context says of rows."""

from typing import Any, cast

from emu35.model.context import AttentionContext
from emu35.model.lora import AdaptedLinear
from emu35.parallel import cpu

cpu.install()

from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402


class Layer(TransformerLayer):
    """mcore hands the context to attention alone, while adapters sit in the MLP as well. Told here,
    at the beginning of the layer's own forward, they are told again when it is recomputed, by the
    context of that micro-batch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of mcore's layer."""
        context = kwargs.get("packed_seq_params")
        assert isinstance(context, AttentionContext), "the model is called with an AttentionContext"
        rows_BS = context.adapted_BS
        for linear in self._linears():
            linear.rows_SB1 = None if rows_BS is None else rows_BS.t()[..., None]
        return super().forward(*args, **kwargs)

    def _linears(self) -> list[AdaptedLinear]:
        attention, mlp = cast(Any, self.self_attention), cast(Any, self.mlp)
        maps = attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2
        return [linear for linear in maps if isinstance(linear, AdaptedLinear)]
