"""Names and shapes of the language model's tensors in the released form, computed without torch.

The released names are those of the official checkpoint (``model.embed_tokens.weight`` and so on):
what a release contains and what the 34B golden file lists. Everything that asks how large a model
is (``plan``, ``show``, the export and the import checks) asks here, so there is one answer.
"""

from math import prod

from emu35.config.model import LMConfig
from emu35.config.stage import LoRAConfig, LoRATarget


def hf_shapes(config: LMConfig, *, vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    """Official tensor name -> shape, in the order a release stores them.

    No tensor is a bias and the output layer is not tied to the embedding (paper Table 1).
    """
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary_size, hidden)}
    for layer in range(config.num_layers):
        for name, shape in layer_shapes(config).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary_size, hidden)
    return shapes


def layer_shapes(config: LMConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of one decoder layer, named relative to the layer."""
    hidden, ffn, head_dim = config.hidden_size, config.ffn_hidden_size, config.head_dim
    query_rows = config.num_attention_heads * head_dim
    kv_rows = config.num_kv_heads * head_dim
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query_rows, hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.o_proj.weight": (hidden, query_rows),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }


def parameter_count(config: LMConfig, *, vocabulary_size: int) -> int:
    """Number of parameters of the whole model, vocabulary padding not counted."""
    return sum(prod(shape) for shape in hf_shapes(config, vocabulary_size=vocabulary_size).values())


def adapted_shapes(config: LMConfig, *, lora: LoRAConfig) -> dict[LoRATarget, tuple[int, int]]:
    """(outputs, inputs) of the linear maps of a layer that have an adapter."""
    hidden, ffn, head_dim = config.hidden_size, config.ffn_hidden_size, config.head_dim
    query_rows = config.num_attention_heads * head_dim
    shapes = {
        LoRATarget.linear_qkv: (query_rows + 2 * config.num_kv_heads * head_dim, hidden),
        LoRATarget.linear_proj: (hidden, query_rows),
        LoRATarget.linear_fc1: (2 * ffn, hidden),
        LoRATarget.linear_fc2: (hidden, ffn),
    }
    return {target: shapes[target] for target in lora.targets}


def adapter_count(config: LMConfig, *, lora: LoRAConfig) -> int:
    """Number of parameters of all adapters of the whole model."""
    shapes = adapted_shapes(config, lora=lora).values()
    return config.num_layers * lora.rank * sum(outputs + inputs for outputs, inputs in shapes)
