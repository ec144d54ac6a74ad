"""The language model that tests build where its size does not matter: two layers, grouped queries,
a head dimension that times the heads is not the hidden size."""

from typing import Any

from emu35.config import LMConfig


def tiny_lm(**changes: Any) -> LMConfig:
    """A fresh configuration; ``changes`` replace its fields."""
    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    return LMConfig(**(fields | changes))
