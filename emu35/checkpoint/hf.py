"""Official tensor names and layouts <-> megatron-core's, as pure functions on tensors.

Three things differ besides the names.

``linear_qkv`` holds query, key and value in one matrix, interleaved by key-value group so that a
tensor-parallel rank can take whole groups. With 2 queries a group its rows are, in units of
head_dim: ``q0 q1 k0 v0 | q2 q3 k1 v1 | ...``. Official heads are numbered group by group too, so
splitting is a reshape and no permutation of heads is needed.

``linear_fc1`` is ``[gate; up]``, stacked by rows.

The embedding and the output layer may have rows beyond the vocabulary, added so that they divide
over ranks; those never leave.

Both directions only reshape and slice, hence they are exact inverses in every dtype. Out of the
model goes a whole one: layers counted from the first stage, no shards. Into it, each rank takes its
own part: of the layers those of its pipeline stages, under the numbers that they have in the whole
model, the embedding on the first stage and the output layer on the last; and of each tensor, by
its tensor-parallel rank, whole key-value groups, the same rows of gate and up, rows of the
vocabulary, and columns of the two projections that write to the residual stream.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
COLUMN_NAMES = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""Tensors of a layer of which a tensor-parallel rank holds columns."""
VOCABULARY_NAMES = ("model.embed_tokens.weight", "lm_head.weight")

QKV, FC1 = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"

_LAYERS = "decoder.layers."
_ROWS = 4096
"""Vocabulary rows read at a time: with a large vocabulary, a rank's rows of one matrix are a good
part of all that it holds."""


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
        ours, theirs = f"{_LAYERS}{layer}.", f"model.layers.{layer}."
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


@dataclass(kw_only=True, slots=True, frozen=True)
class Shard:
    """Part ``rank`` of ``size`` equal parts of every weight that is split over ranks."""

    rank: int = 0
    size: int = 1


@runtime_checkable
class PartReader(Protocol):
    """Official tensors of which a part can be read alone."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor, known without reading it."""
        ...

    def part(self, name: str, *, dim: int, start: int, stop: int) -> torch.Tensor:
        """Indices [start, stop) of dimension ``dim`` of a tensor."""
        ...


@dataclass(kw_only=True, slots=True, frozen=True)
class Piece:
    """Indices [start, stop) of dimension ``dim`` of the official tensor ``name``, and the view of
    a parameter that they fill, of as many elements in the same order."""

    name: str
    dim: int
    start: int
    stop: int
    target: torch.Tensor


@torch.no_grad()
def fill_from_hf(
    parameters: Mapping[str, torch.Tensor],
    *,
    state: Mapping[str, torch.Tensor],
    config: LMConfig,
    vocabulary_size: int,
    shard: Shard | None = None,
) -> None:
    """The inverse of :func:`to_hf`: copy official tensors into the parameters of one rank,
    converted to their type. Vocabulary rows beyond the real ones become zero.

    ``parameters`` may be a part of the model: some layers, with or without the embedding and what
    follows the last layer. Parameters of other names are left alone.

    Every part goes straight from ``state`` to its place, so nothing of the model's size exists
    beside the parameters; of a ``state`` that is a :class:`PartReader` only this rank's parts are
    read.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has the wrong shape; also one that this
            rank does not hold, if ``state`` is a :class:`PartReader`.
    """
    expected = hf_shapes(config, vocabulary_size=vocabulary_size)
    if not isinstance(state, PartReader):
        _check_names(set(state), expected=set(expected), what="the release")
    else:
        # All of them, so that every rank comes to the same conclusion.
        check_tensors(state, names=set(state), expected=expected, what="the release")
    for piece in held_pieces(
        parameters, config=config, vocabulary_size=vocabulary_size, shard=shard or Shard()
    ):
        if isinstance(state, PartReader):
            _copy(piece, state=state)
        else:
            tensor = state[piece.name]
            _check_shape(piece.name, found=tuple(tensor.shape), expected=expected[piece.name])
            part = tensor.narrow(piece.dim, piece.start, piece.stop - piece.start)
            piece.target.copy_(part.reshape(piece.target.shape))
    zero_padding(parameters, vocabulary_size=vocabulary_size, shard=shard)


@torch.no_grad()
def zero_padding(
    parameters: Mapping[str, torch.Tensor], *, vocabulary_size: int, shard: Shard | None = None
) -> None:
    """Set the vocabulary rows of one rank that stand for no id to zero."""
    for name in VOCABULARY_NAMES:
        if (weight := parameters.get(GLOBAL_NAMES[name])) is not None:
            real = _real_rows(weight, vocabulary_size=vocabulary_size, shard=shard or Shard())
            weight[real:] = 0


def _copy(piece: Piece, *, state: PartReader) -> None:
    """Read a piece into its place, rows of the vocabulary a few at a time."""
    rows = _ROWS if piece.name in VOCABULARY_NAMES else max(1, piece.stop - piece.start)
    for start in range(piece.start, piece.stop, rows):
        stop = min(start + rows, piece.stop)
        part = state.part(piece.name, dim=piece.dim, start=start, stop=stop)
        target = piece.target
        if piece.name in VOCABULARY_NAMES:
            target = target[start - piece.start : stop - piece.start]
        target.copy_(part.reshape(target.shape))


def held_pieces(
    parameters: Mapping[str, torch.Tensor],
    *,
    config: LMConfig,
    vocabulary_size: int,
    shard: Shard,
) -> Iterator[Piece]:
    """Every official tensor that this rank holds a part of, with that part."""
    for name, ours in GLOBAL_NAMES.items():
        if (weight := parameters.get(ours)) is None:
            continue
        if name in VOCABULARY_NAMES:
            count = _real_rows(weight, vocabulary_size=vocabulary_size, shard=shard)
            start = min(shard.rank * len(weight), vocabulary_size)
            yield Piece(name=name, dim=0, start=start, stop=start + count, target=weight[:count])
        else:
            yield Piece(name=name, dim=0, start=0, stop=len(weight), target=weight)
    for layer in _held_layers(parameters):
        ours, theirs = f"{_LAYERS}{layer}.", f"model.layers.{layer}."
        for name, mcore in LAYER_NAMES.items():
            weight = parameters[ours + mcore]
            dim = int(name in COLUMN_NAMES)
            start = shard.rank * weight.shape[1] if dim else 0
            stop = start + weight.shape[dim]
            yield Piece(name=theirs + name, dim=dim, start=start, stop=stop, target=weight)
        for name, target in {
            **_qkv_views(parameters[ours + QKV], config=config),
            **_fc1_views(parameters[ours + FC1]),
        }.items():
            rows = target.numel() // config.hidden_size
            start = shard.rank * rows
            yield Piece(name=theirs + name, dim=0, start=start, stop=start + rows, target=target)


def _held_layers(parameters: Mapping[str, torch.Tensor]) -> list[int]:
    """The layers that ``parameters`` have, each of them whole."""
    names = (name.removeprefix(_LAYERS) for name in parameters if name.startswith(_LAYERS))
    return sorted({int(name.split(".")[0]) for name in names})


def _qkv_views(weight: torch.Tensor, *, config: LMConfig) -> dict[str, torch.Tensor]:
    """Where query, key and value lie in the key-value groups that ``weight`` holds."""
    queries = config.num_attention_heads // config.num_kv_heads
    by_group = weight.view(-1, queries + 2, config.head_dim, config.hidden_size)
    parts = by_group.split([queries, 1, 1], dim=1)
    return {f"self_attn.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}


def _fc1_views(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    gate, up = weight.chunk(2)
    return {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}


def _real_rows(weight: torch.Tensor, *, vocabulary_size: int, shard: Shard) -> int:
    """How many rows of a rank's vocabulary matrix stand for an id; the rest pads."""
    return max(0, min(len(weight), vocabulary_size - shard.rank * len(weight)))


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


def _mcore_names(config: LMConfig) -> list[str]:
    layer_names = [*LAYER_NAMES.values(), QKV, FC1]
    return [
        *GLOBAL_NAMES.values(),
        *(f"{_LAYERS}{n}.{name}" for n in range(config.num_layers) for name in layer_names),
    ]


def _check_names(found: set[str], *, expected: set[str], what: str) -> None:
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        raise CheckpointError(
            f"{what} has not the tensors of this architecture: {_some(missing)} missing, "
            f"{_some(unknown)} unknown; check num_layers and the tensor names"
        )


def check_tensors(
    state: PartReader, *, names: set[str], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Check the ``names`` and the shapes that ``state`` has; nothing is read.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has the wrong shape.
    """
    _check_names(names, expected=set(expected), what=what)
    for name, shape in expected.items():
        _check_shape(name, found=state.shape(name), expected=shape)


def _check_shapes(
    found: Mapping[str, torch.Tensor], *, expected: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in expected.items():
        _check_shape(name, found=tuple(found[name].shape), expected=shape)


def _check_shape(name: str, *, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise CheckpointError(f"{name} has shape {found}, but the configuration says {expected}")


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
