"""Official tensor names and layouts <-> megatron-core's, as pure functions on tensors.

Three things differ besides the names.

``linear_qkv`` holds query, key and value in one matrix, interleaved by key-value group so that a
tensor-parallel rank can take whole groups. With 2 queries a group its rows are, in units of
head_dim: ``q0 q1 k0 v0 | q2 q3 k1 v1 | ...``. Official heads are numbered group by group too, so
splitting is a reshape and no permutation of heads is needed.

``linear_fc1`` is ``[gate; up]``, stacked by rows.

The embedding and the output layer may have rows beyond the vocabulary, added so that they divide
over ranks; those never leave.

Both directions only reshape, slice and concatenate, hence they are exact inverses in every dtype.
Names of the unpartitioned model are meant: layers counted from the first stage, no shards.
"""

from collections.abc import Iterator, Mapping

import torch

from emu35.config import LMConfig
from emu35.errors import CheckpointError
from emu35.model.shapes import hf_shapes

GLOBAL_NAMES = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
LAYER_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
VOCABULARY_NAMES = ("model.embed_tokens.weight", "lm_head.weight")

QKV, FC1 = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"


def to_hf(
    state: Mapping[str, torch.Tensor], *, config: LMConfig, vocabulary_size: int
) -> dict[str, torch.Tensor]:
    """Tensors of the unpartitioned mcore model under official names, in release order.

    Where the layout allows it the results are views of the inputs; nothing is changed in place.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has the wrong shape.
    """
    _check_names(set(state), expected=set(_mcore_names(config)), what="the model")
    found: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"][:vocabulary_size]
    }
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        parts = split_qkv(state[ours + QKV], config=config)
        gate, up = state[ours + FC1].chunk(2)
        for name, tensor in {
            **{hf: state[ours + mcore] for hf, mcore in LAYER_NAMES.items()},
            "self_attn.q_proj.weight": parts[0],
            "self_attn.k_proj.weight": parts[1],
            "self_attn.v_proj.weight": parts[2],
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
        }.items():
            found[theirs + name] = tensor
    found["model.norm.weight"] = state["decoder.final_layernorm.weight"]
    found["lm_head.weight"] = state["output_layer.weight"][:vocabulary_size]
    expected = hf_shapes(config, vocabulary_size=vocabulary_size)
    _check_shapes(found, expected=expected)
    return {name: found[name] for name in expected}


def to_mcore(
    state: Mapping[str, torch.Tensor],
    *,
    config: LMConfig,
    vocabulary_size: int,
    padded_vocabulary_size: int | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The inverse of :func:`to_hf`, tensor by tensor, so that ``state`` may read them from disk as
    they are asked for. Vocabulary rows up to ``padded_vocabulary_size`` are zero.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has the wrong shape.
    """
    expected = hf_shapes(config, vocabulary_size=vocabulary_size)
    _check_names(set(state), expected=set(expected), what="the release")

    def get(name: str) -> torch.Tensor:
        tensor = state[name]
        _check_shapes({name: tensor}, expected={name: expected[name]})
        return tensor

    padding = (padded_vocabulary_size or vocabulary_size) - vocabulary_size
    for hf, mcore in GLOBAL_NAMES.items():
        tensor = get(hf)
        if padding and hf in VOCABULARY_NAMES:
            tensor = torch.cat([tensor, tensor.new_zeros(padding, config.hidden_size)])
        yield mcore, tensor
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for hf, mcore in LAYER_NAMES.items():
            yield ours + mcore, get(theirs + hf)
        q, k, v = (get(f"{theirs}self_attn.{part}_proj.weight") for part in "qkv")
        yield ours + QKV, merge_qkv(q, k, v, config=config)
        gate, up = (get(f"{theirs}mlp.{part}_proj.weight") for part in ("gate", "up"))
        yield ours + FC1, torch.cat([gate, up])


def split_qkv(weight: torch.Tensor, *, config: LMConfig) -> list[torch.Tensor]:
    """Interleaved [(heads + 2 kv) * head_dim, hidden] -> query, key and value projections."""
    groups, dim = config.num_kv_heads, config.head_dim
    queries = config.num_attention_heads // groups
    try:
        by_group = weight.view(groups, queries + 2, dim, config.hidden_size)
    except RuntimeError:
        raise CheckpointError(
            f"linear_qkv has shape {tuple(weight.shape)}, not "
            f"{(groups * (queries + 2) * dim, config.hidden_size)}"
        ) from None
    parts = by_group.split([queries, 1, 1], dim=1)
    return [part.reshape(-1, config.hidden_size) for part in parts]


def merge_qkv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, config: LMConfig
) -> torch.Tensor:
    """The inverse of :func:`split_qkv`."""
    groups, dim, hidden = config.num_kv_heads, config.head_dim, config.hidden_size
    parts = [part.view(groups, -1, dim, hidden) for part in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, hidden)


def _mcore_names(config: LMConfig) -> list[str]:
    layer_names = [*LAYER_NAMES.values(), QKV, FC1]
    return [
        *GLOBAL_NAMES.values(),
        *(f"decoder.layers.{n}.{name}" for n in range(config.num_layers) for name in layer_names),
    ]


def _check_names(found: set[str], *, expected: set[str], what: str) -> None:
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        raise CheckpointError(
            f"{what} has not the tensors of this architecture: {_some(missing)} missing, "
            f"{_some(unknown)} unknown; check num_layers and the tensor names"
        )


def _check_shapes(
    found: Mapping[str, torch.Tensor], *, expected: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise CheckpointError(
                f"{name} has shape {tuple(found[name].shape)}, but the configuration says {shape}"
            )


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
