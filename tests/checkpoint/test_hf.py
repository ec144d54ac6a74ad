import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu35.checkpoint.hf import merge_qkv, split_qkv, to_hf, to_mcore
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
    sizes = {"vocabulary_size": vocabulary, "padded_vocabulary_size": vocabulary + padding}
    state = dict(to_mcore(release, config=config, **sizes))
    assert state["output_layer.weight"].shape[0] == vocabulary + padding
    assert not state["output_layer.weight"][vocabulary:].any()
    back = to_hf(state, config=config, vocabulary_size=vocabulary)
    assert list(back) == list(release)
    assert all(torch.equal(back[name], release[name]) for name in release)
    again = dict(to_mcore(back, config=config, **sizes))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_query_heads_stay_with_their_group() -> None:
    """The layout spelled out: 4 query heads, 2 groups, each row naming what it is."""
    config = LMConfig(hidden_size=1, num_attention_heads=4, num_kv_heads=2, head_dim=2)
    q = torch.tensor([[0.0], [0.1], [1.0], [1.1], [2.0], [2.1], [3.0], [3.1]])
    k = torch.tensor([[10.0], [10.1], [11.0], [11.1]])
    v = torch.tensor([[20.0], [20.1], [21.0], [21.1]])
    merged = merge_qkv(q, k, v, config=config)
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
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight missing.*gate_proj\.bias unkn"):
        dict(to_mcore(release, config=config, vocabulary_size=5))


def test_wrong_shape_is_named() -> None:
    config = LMConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, head_dim=2)
    release = random_release(config, vocabulary=5, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \(5, 8\).*\(6, 8\)"):
        dict(to_mcore(release, config=config, vocabulary_size=6))
