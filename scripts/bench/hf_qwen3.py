"""Hugging Face's Qwen3 with the weights of a model of ours, which several benchmarks compare."""

from collections.abc import Mapping
from typing import Any

import torch

from emu35.config import LMConfig


def hf_qwen3(
    weights: Mapping[str, torch.Tensor],
    *,
    config: LMConfig,
    vocabulary_size: int,
    use_cache: bool = False,
) -> Any:
    """``Qwen3ForCausalLM`` of the architecture ``config``, filled with ``weights`` under official
    names (:func:`emu35.checkpoint.hf.to_hf`)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            use_cache=use_cache,
        )
    )
    assert model.config._attn_implementation == "sdpa", "the fastest of HF's own on a CPU"
    model.load_state_dict(dict(weights))
    return model
