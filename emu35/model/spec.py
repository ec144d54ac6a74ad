"""The only file, beside :mod:`emu35.model.lora` and :mod:`emu35.model.layer`, that names
megatron-core's layer classes.

The local spec works on CPU and GPU alike: mcore's own parallel linears with a place for an adapter,
our RMSNorm and SwiGLU, and our core attention. The spec of transformer-engine fuses each norm with
the projection behind it and brings FP8; it has the same core attention, and its checkpoints have
the same names.
"""

from typing import Any

import torch

from emu35.config import EngineConfig, LayerSpec, LMConfig
from emu35.errors import LaunchError
from emu35.model.attention.core import CoreAttention
from emu35.model.layer import Layer
from emu35.model.lora import ColumnLinear, RowLinear
from emu35.model.names import FUSED_NORM_NAMES
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
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    TransformerLayer,
    TransformerLayerSubmodules,
)

# mcore's annotations ask for a module where its own specs put these.
_BIAS_DROPOUT_ADD: Any = get_bias_dropout_add
_IDENTITY: Any = IdentityOp


def layer_specs(
    config: LMConfig, *, engine: EngineConfig, num_layers: int, first_layer: int
) -> TransformerBlockSubmodules:
    """Specs of the ``num_layers`` layers that one pipeline stage holds, beginning with the global
    layer number ``first_layer`` (1-based).

    Raises:
        LaunchError: engine.layers=te without a GPU or without transformer-engine.
    """
    core_attention = ModuleSpec(
        module=CoreAttention,
        params={
            "backend": config.attention_backend,
            "rope_theta": config.rope_theta,
            "first_layer": first_layer,
        },
    )
    fused = engine.layers is LayerSpec.te
    layer, norm = _fused_layer(core_attention) if fused else _local_layer(core_attention)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _local_layer(core_attention: ModuleSpec) -> tuple[ModuleSpec, Any]:
    norm: Any = RMSNorm
    return (
        ModuleSpec(
            module=Layer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=_attention(
                    core_attention, qkv=ColumnLinear, proj=RowLinear, norm=norm
                ),
                self_attn_bda=_BIAS_DROPOUT_ADD,
                pre_mlp_layernorm=norm,
                mlp=_mlp(fc1=ColumnLinear, fc2=RowLinear),
                mlp_bda=_BIAS_DROPOUT_ADD,
            ),
        ),
        norm,
    )


def _fused_layer(core_attention: ModuleSpec) -> tuple[ModuleSpec, Any]:
    te = _transformer_engine()
    norm, row = te.TENorm, te.TERowParallelLinear
    column = te.TELayerNormColumnParallelLinear
    return (
        ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=_IDENTITY,
                self_attention=_attention(core_attention, qkv=column, proj=row, norm=norm),
                self_attn_bda=_BIAS_DROPOUT_ADD,
                pre_mlp_layernorm=_IDENTITY,
                mlp=_mlp(fc1=column, fc2=row),
                mlp_bda=_BIAS_DROPOUT_ADD,
                sharded_state_dict_keys_map=FUSED_NORM_NAMES,
            ),
        ),
        norm,
    )


def _attention(core_attention: ModuleSpec, *, qkv: Any, proj: Any, norm: Any) -> ModuleSpec:
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=qkv,
            core_attention=core_attention,
            linear_proj=proj,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def _mlp(*, fc1: Any, fc2: Any) -> ModuleSpec:
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=fc1, activation_func=SwiGLU, linear_fc2=fc2),
    )


def _transformer_engine() -> Any:
    if not torch.cuda.is_available():
        raise LaunchError("engine.layers=te needs a CUDA device; use engine.layers=local here")
    try:
        from megatron.core.extensions import transformer_engine
    except ImportError as error:
        raise LaunchError(
            f"engine.layers=te needs transformer-engine ({error}); install the extra 'gpu', or use "
            "engine.layers=local"
        ) from error
    return transformer_engine


def mark_partitions(model: torch.nn.Module) -> None:
    """Tell each weight how it is split. mcore does so only while it initialises a weight, which
    it is told not to do, yet the gradient norm and our own initialisation read these marks."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            set_tensor_model_parallel_attributes(module.weight, True, dim=0, stride=1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, True, dim=1, stride=1)
