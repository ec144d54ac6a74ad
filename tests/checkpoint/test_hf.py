from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu35.checkpoint.hf import Shard, fill_from_hf, split_qkv, to_hf
from emu35.config import LMConfig
from emu35.errors import CheckpointError
from emu35.model.shapes import hf_shapes


@st.composite
def architectures(draw: st.DrawFn) -> LMConfig:
    kv = draw(st.integers(1, 4))
    return LMConfig(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 9)),
        ffn_hidden_size=draw(st.integers(1, 7)),
        num_kv_heads=kv,
        num_attention_heads=kv * draw(st.integers(1, 4)),
        head_dim=2 * draw(st.integers(1, 3)),
    )


def random_release(
    config: LMConfig, *, vocabulary: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in hf_shapes(config, vocabulary_size=vocabulary).items()
    }


def parameters(
    config: LMConfig, *, vocabulary_rows: int, dtype: torch.dtype = torch.float32, tp: int = 1
) -> dict[str, torch.Tensor]:
    """Parameters of one tensor-parallel rank as a model has them before it is filled: NaN."""
    hidden, dim, ffn = config.hidden_size, config.head_dim, config.ffn_hidden_size // tp
    heads, groups = config.num_attention_heads // tp, config.num_kv_heads // tp
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (vocabulary_rows, hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (vocabulary_rows, hidden),
    }
    for layer in range(config.num_layers):
        for name, shape in {
            "input_layernorm": (hidden,),
            "self_attention.linear_qkv": ((heads + 2 * groups) * dim, hidden),
            "self_attention.linear_proj": (hidden, heads * dim),
            "self_attention.q_layernorm": (dim,),
            "self_attention.k_layernorm": (dim,),
            "pre_mlp_layernorm": (hidden,),
            "mlp.linear_fc1": (2 * ffn, hidden),
            "mlp.linear_fc2": (hidden, ffn),
        }.items():
            shapes[f"decoder.layers.{layer}.{name}.weight"] = shape
    return {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in shapes.items()}


def rank_of_whole(whole: torch.Tensor, name: str, *, rank: int, tp: int) -> torch.Tensor:
    """What megatron-core's layers hold on a rank, cut out of the unpartitioned parameter."""
    if "linear_fc1" in name:
        return torch.cat([half.chunk(tp)[rank] for half in whole.chunk(2)])
    if "linear_fc2" in name or "linear_proj" in name:
        return whole.chunk(tp, dim=1)[rank]
    return whole if whole.ndim == 1 else whole.chunk(tp)[rank]


@settings(max_examples=60, deadline=None)
@given(
    config=architectures(),
    vocabulary=st.integers(1, 9),
    padding=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_both_directions_are_exact_inverses(
    config: LMConfig, vocabulary: int, padding: int, dtype: torch.dtype
) -> None:
    release = random_release(config, vocabulary=vocabulary, dtype=dtype)
    model = parameters(config, vocabulary_rows=vocabulary + padding, dtype=dtype)
    fill_from_hf(model, state=release, config=config, vocabulary_size=vocabulary)
    assert not any(tensor.isnan().any() for tensor in model.values())
    assert not model["output_layer.weight"][vocabulary:].any()
    back = to_hf(model, config=config, vocabulary_size=vocabulary)
    assert list(back) == list(release)
    assert all(torch.equal(back[name], release[name]) for name in release)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    config=architectures(),
    tp=st.integers(2, 4),
    vocabulary=st.integers(1, 13),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_rank_gets_its_slices_of_the_whole_model(
    data: st.DataObject, config: LMConfig, tp: int, vocabulary: int, stored: torch.dtype
) -> None:
    groups = tp * data.draw(st.integers(1, 2))
    config = replace(
        config,
        num_kv_heads=groups,
        num_attention_heads=groups * data.draw(st.integers(1, 3)),
        ffn_hidden_size=tp * config.ffn_hidden_size,
    )
    rows = -(-vocabulary // tp)
    release = random_release(config, vocabulary=vocabulary, dtype=stored)
    whole = parameters(config, vocabulary_rows=tp * rows)
    fill_from_hf(whole, state=release, config=config, vocabulary_size=vocabulary)
    for rank in range(tp):
        held = parameters(config, vocabulary_rows=rows, tp=tp)
        fill_from_hf(
            held,
            state=release,
            config=config,
            vocabulary_size=vocabulary,
            shard=Shard(rank=rank, size=tp),
        )
        for name, tensor in held.items():
            expected = rank_of_whole(whole[name], name, rank=rank, tp=tp)
            assert torch.equal(tensor, expected), (name, rank)


def test_query_heads_stay_with_their_group() -> None:
    """The layout spelled out: 4 query heads, 2 groups, each row naming what it is."""
    config = LMConfig(
        num_layers=1,
        hidden_size=1,
        ffn_hidden_size=2,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=2,
    )
    release = random_release(config, vocabulary=3, dtype=torch.float32)
    q = torch.tensor([[0.0], [0.1], [1.0], [1.1], [2.0], [2.1], [3.0], [3.1]])
    k = torch.tensor([[10.0], [10.1], [11.0], [11.1]])
    v = torch.tensor([[20.0], [20.1], [21.0], [21.1]])
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        release[f"model.layers.0.self_attn.{name}_proj.weight"] = tensor
    model = parameters(config, vocabulary_rows=3)
    fill_from_hf(model, state=release, config=config, vocabulary_size=3)
    merged = model["decoder.layers.0.self_attention.linear_qkv.weight"]
    first = [0.0, 0.1, 1.0, 1.1, 10.0, 10.1, 20.0, 20.1]
    second = [2.0, 2.1, 3.0, 3.1, 11.0, 11.1, 21.0, 21.1]
    assert merged.flatten().tolist() == pytest.approx(first + second)
    assert all(
        torch.equal(a, b) for a, b in zip(split_qkv(merged, config=config), (q, k, v), strict=True)
    )


def test_missing_and_unknown_tensors_are_named() -> None:
    config = LMConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, head_dim=2)
    release = random_release(config, vocabulary=5, dtype=torch.float32)
    release["model.layers.0.mlp.gate_proj.bias"] = release.pop("model.norm.weight")
    model = parameters(config, vocabulary_rows=5)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight missing.*gate_proj\.bias unkn"):
        fill_from_hf(model, state=release, config=config, vocabulary_size=5)


def test_wrong_shape_is_named() -> None:
    config = LMConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, head_dim=2)
    release = random_release(config, vocabulary=5, dtype=torch.float32)
    model = parameters(config, vocabulary_rows=6)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \(5, 8\).*\(6, 8\)"):
        fill_from_hf(model, state=release, config=config, vocabulary_size=6)
