"""Every backend against the dense oracle, forward and backward, on the device it is for."""

import sys
from pathlib import Path

import pytest
import torch

from emu35.model.attention import dense, flex, segment, varlen
from emu35.model.context import AttentionContext
from emu35.model.mask import AttentionMask

pytestmark = pytest.mark.gpu

sys.path.insert(0, str(Path(__file__).parents[1] / "dida"))

LENGTH = 600
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 4e-2}
"""fp32 products may use TF32."""


def packed() -> AttentionMask:
    start_BS = torch.zeros(2, LENGTH, dtype=torch.int64)
    start_BS[0, 200:], start_BS[0, 330:], start_BS[0, 550:] = 200, 330, LENGTH
    start_BS[1, 128:] = 128
    return AttentionMask.causal(start_BS)


def with_copies() -> AttentionMask:
    """Causal documents and two noisy copies, as DiDA trains."""
    mask = packed()
    mask.start1_BS[:, 400:500], mask.end1_BS[:, 400:500] = 330, 360
    mask.start2_BS[:, 400:500], mask.end2_BS[:, 400:500] = 400, 500
    return mask


def laid_out() -> AttentionMask:
    """Rows of several documents and pictures with their copies, as the layout of training has them,
    padding in both parts."""
    from copies_batch import two_rows

    batch = two_rows()
    assert batch.intervals is not None
    return AttentionMask.from_intervals(batch.intervals)


def attend(backend, mask: AttentionMask, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    length = mask.start1_BS.shape[1]
    draws = [torch.randn(2, h, length, 64, generator=generator) for h in (4, 2, 2, 4)]
    query, key, value = (t.to("cuda", dtype).requires_grad_() for t in draws[:3])
    output = backend(query, key_BGKD=key, value_BGKD=value, context=AttentionContext(mask=mask))
    output.backward(draws[3].to("cuda", dtype))
    found = [output.detach(), query.grad, key.grad, value.grad]
    return [tensor.float() for tensor in found if tensor is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mask", [packed, with_copies, laid_out])
@pytest.mark.parametrize("backend", [flex.attend, segment.attend], ids=["flex", "segment"])
def test_backend_equals_dense_forward_and_backward(backend, mask, dtype: torch.dtype) -> None:
    oracle = attend(dense.attend, mask(), torch.float32)
    found = attend(backend, mask(), dtype)
    assert len(found) == len(oracle) == 4
    for ours, theirs in zip(found, oracle, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_flash_equals_dense_on_packed_documents() -> None:
    oracle = attend(dense.attend, packed(), torch.float32)
    found = attend(varlen.attend_flash, packed(), torch.bfloat16)
    for ours, theirs in zip(found, oracle, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4e-2, atol=4e-2)


def test_transformer_engine_equals_dense_on_packed_documents() -> None:
    pytest.importorskip("transformer_engine")
    oracle = attend(dense.attend, packed(), torch.float32)
    found = attend(varlen.attend_te, packed(), torch.bfloat16)
    for ours, theirs in zip(found, oracle, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4e-2, atol=4e-2)


def test_lengths_of_one_bucket_compile_once() -> None:
    from torch._dynamo.utils import counters

    def run(length: int) -> None:
        mask = AttentionMask.causal(torch.zeros(1, length, dtype=torch.int64))
        states = torch.randn(1, 2, length, 64, device="cuda", requires_grad=True)
        context = AttentionContext(mask=mask)
        flex.attend(states, key_BGKD=states, value_BGKD=states, context=context).sum().backward()

    run(1_000)
    before = counters["stats"]["unique_graphs"]
    for length in (900, 930, 1_001, 1_024):
        run(length)
    assert counters["stats"]["unique_graphs"] == before
    run(1_025)
    assert counters["stats"]["unique_graphs"] == before + 1
