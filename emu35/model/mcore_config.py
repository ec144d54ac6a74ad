"""Our configuration sections as megatron-core's ``TransformerConfig``."""

from typing import Any

import torch
import torch.nn.functional as F

from emu35.config import (
    FP8,
    EngineConfig,
    FP8Recipe,
    LayerSpec,
    LMConfig,
    ParallelConfig,
    Precision,
    Recompute,
)
from emu35.parallel import cpu

cpu.install()

from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


def transformer_config(
    config: LMConfig, *, parallel: ParallelConfig, engine: EngineConfig, precision: Precision
) -> TransformerConfig:
    """The last step before building, because mcore derives further values when this is made."""
    bf16 = precision is Precision.bf16
    dtype = torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        qk_layernorm=True,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        # The name is TransformerEngine's; it lets a spec bring the activation, here SwiGLU.
        use_te_activation_func=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        init_method_std=config.init_std,
        # Weights are drawn by emu35.model.init, alike in every layout.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=parallel.sp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        pipeline_model_parallel_layout=_stages(parallel),
        context_parallel_size=parallel.cp,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        # The loss is normalised by the global sum of token weights before backward, so mcore must
        # neither average over replicas nor over micro-batches.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **_overlap(engine),
        **_recompute(engine, parallel=parallel, num_layers=config.num_layers),
        **_fp8(engine),
    )


def _stages(parallel: ParallelConfig) -> list[list[str]] | None:
    """What each pipeline stage holds, in mcore's words; None where all hold as many layers."""
    if not parallel.pp_layers:
        return None
    stages = [["decoder"] * count for count in parallel.pp_layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _overlap(engine: EngineConfig) -> dict[str, Any]:
    return {
        "overlap_p2p_comm": engine.overlap_p2p,
        # mcore's batched messages cannot overlap with anything.
        "batch_p2p_comm": not engine.overlap_p2p,
    }


def _recompute(
    engine: EngineConfig, *, parallel: ParallelConfig, num_layers: int
) -> dict[str, Any]:
    if engine.recompute is Recompute.none:
        return {}
    if engine.recompute is Recompute.selective:
        modules = [module.value for module in engine.recompute_modules]
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    # "block" recomputes layer by layer, the first so many of each (virtual) stage; with as many as
    # the largest stage has, all of them.
    count = engine.recompute_layers or max(parallel.stage_layers(num_layers))
    return {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": count,
    }


def _fp8(engine: EngineConfig) -> dict[str, Any]:
    if engine.fp8 is FP8.off or engine.layers is not LayerSpec.te:
        return {}
    edge = engine.bf16_edge_layers
    return {
        "fp8": engine.fp8.value,
        "fp8_recipe": engine.fp8_recipe.value,
        "fp8_amax_history_len": engine.fp8_amax_history,
        "fp8_amax_compute_algo": (
            "max" if engine.fp8_recipe is FP8Recipe.delayed else "most_recent"
        ),
        "first_last_layers_bf16": edge > 0,
        "num_layers_at_start_in_bf16": edge,
        "num_layers_at_end_in_bf16": edge,
    }
