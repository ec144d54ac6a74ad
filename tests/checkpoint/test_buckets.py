"""Weights in buckets: whatever the tensors and the size, what goes in comes out, in place."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf import architectures, parameters, random_release

from emu35.checkpoint.buckets import (
    Bucket,
    Receiver,
    TensorSpec,
    decode,
    encode,
    pack,
    plan_buckets,
    whole_pieces,
)
from emu35.checkpoint.hf import Shard, fill_from_hf, held_pieces, zero_padding
from emu35.config import LMConfig
from emu35.errors import CheckpointError, ConfigError
from emu35.model.shapes import hf_shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    shapes = draw(st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    return {
        f"tensor {number}": torch.randn(shape, generator=generator).to(
            draw(st.sampled_from(DTYPES))
        )
        for number, shape in enumerate(shapes)
    }


def shapes_of(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def largest_row(weights: dict[str, torch.Tensor]) -> int:
    return max(TensorSpec.of(name, tensor).row_bytes for name, tensor in weights.items())


@given(weights=tensors(), extra=st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_what_goes_in_comes_out_in_its_place(weights: dict[str, torch.Tensor], extra: int) -> None:
    limit = largest_row(weights) + extra
    places = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    before = {name: place.data_ptr() for name, place in places.items()}
    receiver = Receiver(shapes_of(weights), pieces=whole_pieces(places))
    for number, bucket in enumerate(pack(weights.items(), bucket_bytes=limit)):
        assert bucket.layout.index == number
        assert bucket.data.numel() == bucket.layout.nbytes <= limit
        sent = encode(bucket)
        back = decode(sent)
        assert back.layout == bucket.layout
        assert back.digest() == bucket.digest()
        receiver.write(back)
    receiver.finish()
    for name, tensor in weights.items():
        assert torch.equal(places[name], tensor)
        assert places[name].data_ptr() == before[name]


@given(weights=tensors(), extra=st.integers(0, 400))
@settings(max_examples=30, deadline=None)
def test_a_plan_of_names_alone_is_what_packing_does(
    weights: dict[str, torch.Tensor], extra: int
) -> None:
    limit = largest_row(weights) + extra
    plan = plan_buckets((TensorSpec.of(*item) for item in weights.items()), bucket_bytes=limit)
    assert list(plan) == [bucket.layout for bucket in pack(weights.items(), bucket_bytes=limit)]


def test_a_tensor_larger_than_a_bucket_is_split_and_buckets_are_full() -> None:
    weights = {"embedding": torch.randn(1000, 8), "norm": torch.ones(8)}
    layouts = [bucket.layout for bucket in pack(weights.items(), bucket_bytes=3200)]
    rows = [(part.start, part.stop) for layout in layouts for part in layout.slices][:-1]
    assert len(layouts) == 11
    assert rows[0] == (0, 100)
    assert all(before[1] == after[0] for before, after in pairwise(rows))
    assert [layout.nbytes for layout in layouts] == [3200] * 10 + [32]


def test_a_bucket_asks_for_no_more_tensors_than_it_holds() -> None:
    asked: list[int] = []

    def weights():
        for number in range(100):
            asked.append(number)
            yield str(number), torch.ones(4)

    buckets = pack(weights(), bucket_bytes=64)
    next(buckets)
    assert len(asked) <= 5


@given(
    config=architectures(),
    tp=st.integers(1, 3),
    padding=st.integers(0, 3),
    extra=st.integers(0, 300),
)
@settings(max_examples=40, deadline=None)
def test_ranks_take_their_parts_as_if_they_read_the_release(
    config: LMConfig, tp: int, padding: int, extra: int
) -> None:
    config = replace(
        config,
        num_kv_heads=config.num_kv_heads * tp,
        num_attention_heads=config.num_attention_heads * tp,
        ffn_hidden_size=config.ffn_hidden_size * tp,
    )
    vocabulary = tp * 4 - padding
    release = random_release(config, vocabulary=vocabulary, dtype=torch.bfloat16)
    limit = largest_row(release) + extra
    for rank in range(tp):
        shard = Shard(rank=rank, size=tp)
        wanted = parameters(config, vocabulary_rows=4, tp=tp)
        fill_from_hf(wanted, state=release, config=config, vocabulary_size=vocabulary, shard=shard)
        found = parameters(config, vocabulary_rows=4, tp=tp)
        zero_padding(found, vocabulary_size=vocabulary, shard=shard)
        pieces = held_pieces(found, config=config, vocabulary_size=vocabulary, shard=shard)
        receiver = Receiver(hf_shapes(config, vocabulary_size=vocabulary), pieces=pieces)
        for bucket in pack(release.items(), bucket_bytes=limit):
            receiver.write(bucket)
        receiver.finish()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name


def some_buckets() -> tuple[dict[str, torch.Tensor], list[Bucket]]:
    weights = {"a": torch.randn(6, 4), "b": torch.randn(3)}
    return weights, list(pack(weights.items(), bucket_bytes=48))


def receiver_of(weights: dict[str, torch.Tensor]) -> Receiver:
    return Receiver(shapes_of(weights), pieces=whole_pieces(weights))


def test_a_receiver_refuses_what_is_out_of_order_and_writes_nothing() -> None:
    weights, buckets = some_buckets()
    places = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    receiver = receiver_of(places)
    with pytest.raises(CheckpointError, match=r"rows 3 to 6 of a, of which 0 have come"):
        receiver.write(buckets[1])
    assert not places["a"].any()
    receiver.write(buckets[0])
    with pytest.raises(CheckpointError, match=r"rows 0 to 3 of a, of which 3 have come"):
        receiver.write(buckets[0])
    with pytest.raises(CheckpointError, match=r"2 of 2 tensors are not whole, a for one"):
        receiver.finish()


def test_a_receiver_refuses_tensors_of_another_model() -> None:
    weights, buckets = some_buckets()
    with pytest.raises(CheckpointError, match=r"has a, which this model has not"):
        receiver_of({"b": weights["b"]}).write(buckets[0])
    with pytest.raises(CheckpointError, match=r"a has shape \(6, 4\), but .* is \(6, 5\)"):
        receiver_of(weights | {"a": torch.zeros(6, 5)}).write(buckets[0])


def test_a_row_that_fits_no_bucket_is_named() -> None:
    with pytest.raises(ConfigError, match=r"bucket_bytes=31 is less than one row of a \(32 bytes"):
        list(pack([("a", torch.zeros(2, 8))], bucket_bytes=31))
    with pytest.raises(CheckpointError, match=r"a is torch\.int64"):
        list(pack([("a", torch.zeros(2, dtype=torch.int64))], bucket_bytes=31))


@given(cut=st.integers(0, 10_000), noise=st.binary(min_size=1, max_size=8), at=st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_damaged_buckets_are_refused_or_noticed(cut: int, noise: bytes, at: int) -> None:
    _, buckets = some_buckets()
    sent = encode(buckets[0])
    with pytest.raises(CheckpointError):
        decode(sent[: cut % len(sent)])
    at %= len(sent)
    damaged = (sent[:at] + noise + sent[at + len(noise) :])[: len(sent)]
    try:
        back = decode(damaged)
    except CheckpointError:
        return
    assert (back.digest() == buckets[0].digest()) == (damaged == sent)
