"""Tensors that buckets split come out whole, each as soon as it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_buckets import largest_row, shapes_of, tensors

from emu35.checkpoint.buckets import pack
from emu35.checkpoint.whole_tensors import WholeTensors
from emu35.errors import CheckpointError


@given(weights=tensors(), extra=st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_tensors_come_out_whole(weights: dict[str, torch.Tensor], extra: int) -> None:
    whole = WholeTensors(shapes_of(weights))
    found: dict[str, torch.Tensor] = {}
    for bucket in pack(weights.items(), bucket_bytes=largest_row(weights) + extra):
        last = {part.spec.name for part in bucket.layout.slices if part.last}
        came = {name: tensor.clone() for name, tensor in whole.feed(bucket)}
        assert set(came) == last
        found |= came
    whole.finish()
    assert list(found) == list(weights)
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_is_missing_or_strange_is_named() -> None:
    weights = {"a": torch.randn(4, 4), "b": torch.randn(4)}
    buckets = list(pack(weights.items(), bucket_bytes=48))
    whole = WholeTensors(shapes_of(weights))
    list(whole.feed(buckets[0]))
    with pytest.raises(CheckpointError, match=r"a is not whole"):
        whole.finish()
    with pytest.raises(CheckpointError, match=r"bucket 0 came where 1 is the next"):
        list(whole.feed(buckets[0]))
    with pytest.raises(CheckpointError, match=r"2 tensors are missing, a for one"):
        WholeTensors(shapes_of(weights)).finish()
    with pytest.raises(CheckpointError, match=r"a is unknown here"):
        list(WholeTensors({"b": (4,)}).feed(next(pack([("a", torch.ones(2))], bucket_bytes=8))))
