"""The only file that names megatron-core's layer classes.

The local spec works on CPU and GPU alike: mcore's own parallel linears, our RMSNorm and SwiGLU, and
our core attention.
"""

from typing import Any

import torch
import torch.nn.functional as F

from emu35.config import LMConfig, ParallelConfig, Precision
from emu35.model.attention.core import CoreAttention
from emu35.model.norm import RMSNorm
from emu35.model.swiglu import SwiGLU
from emu35.parallel import cpu

cpu.install()

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import (  # noqa: E402
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    TransformerLayer,
    TransformerLayerSubmodules,
)

# mcore's annotations ask for a module where its own specs put these.
_BIAS_DROPOUT_ADD: Any = get_bias_dropout_add


_NORM: Any = RMSNorm


def transformer_config(
    config: LMConfig, *, parallel: ParallelConfig, precision: Precision
) -> TransformerConfig:
    """Translate our sections into mcore's configuration; the last step before building, because
    mcore derives further values when it is constructed."""
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
    )


def layer_specs(
    config: LMConfig, *, num_layers: int, first_layer: int
) -> TransformerBlockSubmodules:
    """Specs of the ``num_layers`` layers that one pipeline stage holds, beginning with the global
    layer number ``first_layer`` (1-based)."""
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=ModuleSpec(
                        module=CoreAttention,
                        params={
                            "backend": config.attention_backend,
                            "rope_theta": config.rope_theta,
                            "first_layer": first_layer,
                        },
                    ),
                    linear_proj=RowParallelLinear,
                    q_layernorm=RMSNorm,
                    k_layernorm=RMSNorm,
                ),
            ),
            self_attn_bda=_BIAS_DROPOUT_ADD,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear,
                    activation_func=SwiGLU,
                    linear_fc2=RowParallelLinear,
                ),
            ),
            mlp_bda=_BIAS_DROPOUT_ADD,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=_NORM)


def mark_partitions(model: torch.nn.Module) -> None:
    """Tell each weight how it is split. mcore does so only while it initialises a weight, which
    it is told not to do, yet the gradient norm and our own initialisation read these marks."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            set_tensor_model_parallel_attributes(module.weight, True, dim=0, stride=1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, True, dim=1, stride=1)
