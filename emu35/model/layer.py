"""The transformer layer: mcore's, which passes on to its adapters what the context says of rows."""

from typing import Any

import torch

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
        if isinstance(context, AttentionContext) and context.adapted_BS is not None:
            self._tell(context.adapted_BS.t()[..., None])
        return super().forward(*args, **kwargs)

    def _tell(self, rows_SB1: torch.Tensor) -> None:
        for module in self.modules():
            if isinstance(module, AdaptedLinear):
                module.rows_SB1 = rows_SB1
