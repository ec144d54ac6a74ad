"""The chunked quantizer against its definition, and the codes it gives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from emu35.vision.ibq import chunks, nearest
from emu35.vision.ibq.entropy import EntropySettings
from emu35.vision.ibq.nearest import nearest_codes
from emu35.vision.ibq.propagation import quantize, quantize_plain
from emu35.vision.ibq.quantizer import Quantizer


def rounding(*, z_ND, codebook_KD, gradient_ND):
    """What rounding can do to the gradients. Of the terms G E^T p E, little or nothing is left
    where one code has all the probability, and p itself is off by as many units as its logit is
    large; on top, a code's row sums the gradients of all vectors that chose it."""
    pulls = (gradient_ND.abs() @ codebook_KD.abs().T).max().item()
    largest = max(codebook_KD.abs().max().item(), len(z_ND) * z_ND.abs().max().item())
    logits = (z_ND @ codebook_KD.T).abs().max().item()
    summed = len(z_ND) * gradient_ND.abs().max().item()
    return 4 * torch.finfo(z_ND.dtype).eps * ((1 + logits) * pulls * largest + summed)


def values_and_gradients(function, *, z_ND, codebook_KD, gradient_ND, **options):
    z_ND = z_ND.clone().requires_grad_()
    codebook_KD = codebook_KD.clone().requires_grad_()
    found = function(z_ND, codebook_KD=codebook_KD, **options)
    found.z_q_ND.backward(gradient_ND)
    return found.z_q_ND.detach(), found.codes_N, z_ND.grad, codebook_KD.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(
    vectors=st.integers(1, 40),
    rows=st.integers(1, 90),
    dim=st.integers(1, 12),
    chunk=st.integers(1, 100),
    scale=st.sampled_from([0.01, 1.0, 8.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_chunked_equals_the_definition(dtype, vectors, rows, dim, chunk, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    z_ND, gradient_ND = (
        torch.randn(vectors, dim, dtype=dtype, generator=generator) for _ in range(2)
    )
    codebook_KD = scale * torch.randn(rows, dim, dtype=dtype, generator=generator)
    inputs = {"z_ND": z_ND, "codebook_KD": codebook_KD, "gradient_ND": gradient_ND}
    expected = values_and_gradients(quantize_plain, **inputs)
    found = values_and_gradients(quantize, chunk=chunk, **inputs)
    assert torch.equal(found[1], expected[1])
    for ours, theirs in zip(found[:1] + found[2:], expected[:1] + expected[2:], strict=True):
        assert (ours - theirs).abs().max().item() <= rounding(**inputs)


def test_gradient_of_the_soft_part_is_the_true_one():
    """Index propagation equals the derivative of softmax(L) E as far as z is concerned."""
    torch.manual_seed(0)
    z_ND = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    codebook_KD = torch.randn(11, 3, dtype=torch.float64)
    gradient_ND = torch.randn(5, 3, dtype=torch.float64)
    soft_ND = (z_ND @ codebook_KD.T).softmax(1) @ codebook_KD
    (expected,) = torch.autograd.grad(soft_ND, z_ND, gradient_ND)
    (found,) = torch.autograd.grad(
        quantize(z_ND, codebook_KD=codebook_KD, chunk=4).z_q_ND, z_ND, gradient_ND
    )
    torch.testing.assert_close(found, expected)


def test_every_row_of_the_codebook_gets_a_gradient():
    torch.manual_seed(0)
    z_ND = torch.randn(4, 8)
    codebook_KD = torch.randn(50, 8, requires_grad=True)
    found = quantize(z_ND, codebook_KD=codebook_KD, chunk=7)
    found.z_q_ND.square().sum().backward()
    assert len(found.codes_N.unique()) <= 4
    assert codebook_KD.grad is not None
    assert (codebook_KD.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_ties_go_to_the_lowest_index(chunk):
    codebook_KD = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    z_ND = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    expected = torch.tensor([1, 0, 0])
    assert torch.equal(nearest_codes(z_ND, codebook_KD=codebook_KD, chunk=chunk), expected)
    found = quantize(z_ND, codebook_KD=codebook_KD, chunk=chunk)
    assert torch.equal(found.codes_N, expected)


def test_codes_are_dot_products_not_distances():
    """The far row wins although the near one is closer: the codebook is not normalised."""
    codebook_KD = torch.tensor([[1.0, 0.0], [10.0, 0.0]])
    assert nearest_codes(torch.tensor([[1.0, 0.0]]), codebook_KD=codebook_KD).item() == 1


def test_half_precision_inputs_are_quantized_in_the_precision_of_the_codebook():
    torch.manual_seed(0)
    module = Quantizer(2048, dim=16)
    z_BDHW = torch.randn(1, 16, 8, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized = module(z_BDHW)
    assert quantized.z_q_BDHW.dtype == torch.float32
    z_ND = z_BDHW.float().permute(0, 2, 3, 1).reshape(-1, 16)
    expected = (z_ND.double() @ module.codebook_KD.double().T).argmax(1)
    assert torch.equal(quantized.codes_BHW.flatten(), expected)


def test_grids_keep_their_layout():
    module = Quantizer(32, dim=4)
    quantized = module(torch.randn(2, 4, 3, 5))
    rows_BDHW = module.codebook_KD[quantized.codes_BHW].permute(0, 3, 1, 2)
    torch.testing.assert_close(quantized.hard_BDHW, rows_BDHW)
    torch.testing.assert_close(quantized.z_q_BDHW, rows_BDHW)


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    """No logits beyond the chunk exist at a time, forward or backward."""
    monkeypatch.setattr(nearest, "CPU_CHUNK_ELEMENTS", 1 << 14)
    z_ND = torch.randn(32, 4, requires_grad=True)
    codebook_KD = torch.randn(5000, 4, requires_grad=True)
    with Largest() as seen:
        found = quantize(z_ND, codebook_KD=codebook_KD, entropy=EntropySettings())
        assert found.entropy is not None
        (found.z_q_ND.sum() + found.entropy.loss()).backward()
        nearest_codes(z_ND, codebook_KD=codebook_KD)
    # Three buffers of a chunk; the codebook and its gradient hold 5000 x 4.
    assert math.prod(seen.shape) <= max(3 << 14, 5000 * 4)
    with Largest() as seen:
        quantize_plain(z_ND, codebook_KD=codebook_KD)
    assert math.prod(seen.shape) == 32 * 5000


@pytest.mark.parametrize("rows", [2000, 8000])
def test_no_more_logits_are_kept_for_a_larger_codebook(monkeypatch, rows):
    monkeypatch.setattr(nearest, "CPU_CHUNK_ELEMENTS", 1 << 12)
    monkeypatch.setattr(chunks, "KEPT_ELEMENTS", 1 << 14)
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    z_ND = torch.randn(32, 4, requires_grad=True)
    codebook_KD = torch.randn(rows, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        quantize(z_ND, codebook_KD=codebook_KD, entropy=EntropySettings())
    # Inputs and codes are saved too.
    assert sum(saved.values()) == (1 << 14) + z_ND.numel() + codebook_KD.numel() + 32


def test_search_takes_no_more_memory_for_more_vectors(monkeypatch):
    monkeypatch.setattr(nearest, "VECTORS_AT_ONCE", 16)
    z_ND, codebook_KD = torch.randn(1000, 4), torch.randn(300, 4)
    with Largest() as seen:
        codes_N = nearest_codes(z_ND, codebook_KD=codebook_KD)
    assert math.prod(seen.shape) <= max(16 * 300, 1000 * 4)
    assert torch.equal(codes_N, (z_ND @ codebook_KD.T).argmax(1))


class Largest(TorchDispatchMode):
    """Watches every torch operation; ``shape`` is that of the largest result."""

    def __init__(self):
        super().__init__()
        self.shape = (0,)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor) and each.numel() > math.prod(self.shape):
                self.shape = tuple(each.shape)
        return result
