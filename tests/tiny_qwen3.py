"""Qwen3 folders as published, but narrow: made and saved by the transformers library itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from emu35.config import LMConfig, TokenizerConfig, TokenizerKind

ROWS, TEXT_ROWS = 151_936, 151_643
TOKENIZER = TokenizerConfig(kind=TokenizerKind.emu35, codebook_size=101)
"""With it the vocabulary is odd: two tensor-parallel ranks need a padding row."""


def model_of(*, hidden: int, layers: int, **changes: Any) -> LMConfig:
    """Four query heads in two groups; heads x head_dim is not the hidden size."""
    return LMConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=3 * hidden,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        **changes,
    )


def make_qwen3(
    folder: Path,
    *,
    model: LMConfig,
    tied: bool = False,
    rows: int = ROWS,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    std: float = 0.08,
) -> Any:
    """Save a ``Qwen3ForCausalLM`` with drawn weights, norms included, and return it."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=rows,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            max_position_embeddings=40960,
            rms_norm_eps=model.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            tie_word_embeddings=tied,
            dtype=dtype,
        )
    ).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                # Off zero, so that a mean of rows is told from none.
                parameter.normal_(0.02, std, generator=generator)
    theirs.save_pretrained(folder, max_shard_size=shard_size)
    return theirs.eval()
