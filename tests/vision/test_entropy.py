"""The entropy term: what it means, and the chunked kernel against the definition."""

import math
from dataclasses import dataclass, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu35.vision.ibq import chunks as walk
from emu35.vision.ibq import sharp
from emu35.vision.ibq.entropy import EntropySettings, EntropyTerms
from emu35.vision.ibq.propagation import quantize, quantize_plain
from emu35.vision.ibq.quantizer import Quantizer


@dataclass
class Found:
    sample: torch.Tensor
    codebook: torch.Tensor
    grad_z: torch.Tensor
    grad_codebook: torch.Tensor


def entropies(
    function, *, z_ND, codebook_KD, entropy, gradient_ND=None, weights=(1.0, 1.0), **chunk
):
    """Both entropies and the gradients of their loss, plus those of ``gradient_ND`` at z_q."""
    z_ND, codebook_KD = z_ND.clone().requires_grad_(), codebook_KD.clone().requires_grad_()
    found = function(z_ND, codebook_KD=codebook_KD, entropy=entropy, **chunk)
    terms: EntropyTerms = found.entropy
    loss = terms.loss(sample_weight=weights[0], codebook_weight=weights[1])
    if gradient_ND is not None:
        loss = loss + (found.z_q_ND * gradient_ND).sum()
    loss.backward()
    assert z_ND.grad is not None
    assert codebook_KD.grad is not None
    return Found(terms.sample.detach(), terms.codebook.detach(), z_ND.grad, codebook_KD.grad)


def drawn(*, vectors, rows, dim, scale, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    z_ND, gradient_ND = (
        torch.randn(vectors, dim, dtype=dtype, generator=generator) for _ in range(2)
    )
    codebook_KD = scale * torch.randn(rows, dim, dtype=dtype, generator=generator)
    return {"z_ND": z_ND, "codebook_KD": codebook_KD, "gradient_ND": gradient_ND}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(
    vectors=st.integers(1, 40),
    rows=st.integers(1, 90),
    dim=st.integers(1, 12),
    chunk=st.integers(1, 100),
    scale=st.sampled_from([0.001, 0.1, 1.0, 8.0]),
    temperature=st.sampled_from([0.01, 0.1, 1.0, 3.0]),
    eps=st.sampled_from([0.0, 1e-5]),
    weights=st.sampled_from([(1.0, 1.0), (0.3, 0.0), (0.0, 2.0)]),
    kept=st.sampled_from([0, 500, 1 << 20]),
    share=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_chunked_equals_the_definition(
    dtype, vectors, rows, dim, chunk, scale, temperature, eps, weights, kept, share, seed
):
    """The gradient of z_q arrives at the same time; none, some or all logits are kept; entropies
    come from the list or from a second walk."""
    inputs = drawn(vectors=vectors, rows=rows, dim=dim, scale=scale, seed=seed, dtype=dtype)
    entropy = EntropySettings(temperature=temperature, eps=eps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "KEPT_ELEMENTS", kept)
        patch.setattr(sharp, "CANDIDATE_SHARE", share)
        found = entropies(quantize, **inputs, entropy=entropy, weights=weights, chunk=chunk)
    exact = {name: value.double() for name, value in inputs.items()}
    expected = entropies(quantize_plain, **exact, entropy=entropy, weights=weights)
    allowed = rounding(inputs, entropy=entropy)
    for field in fields(Found):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert ours.dtype == dtype
        assert (ours - theirs).abs().max().item() <= allowed[field.name], field.name


def rounding(inputs, *, entropy):
    """What rounding can do, fp32 inputs against an fp64 reference.

    A probability is off by as many units as its logit over the temperature is large, and so is
    what it multiplies: at most the logarithm of a row's share for entropies, that over the
    temperature for their gradients, and G E^T for index propagation's.
    """
    z_ND, codebook_KD, gradient_ND = (inputs[name] for name in inputs)
    vectors, rows = z_ND.shape[0], codebook_KD.shape[0]
    logits = (z_ND.abs() @ codebook_KD.abs().T).max().item()
    unit = 8 * torch.finfo(z_ND.dtype).eps * (1 + logits / entropy.temperature)
    # Shares as small as the inverse of the smallest number matter to nobody.
    span = math.log(rows) + math.log(vectors) + 25
    pull = 2 * span / (vectors * entropy.temperature)
    propagated = (gradient_ND.abs() @ codebook_KD.abs().T).max().item()
    soft = (pull + propagated) * unit
    return {
        "sample": unit * span,
        "codebook": unit * span,
        "grad_z": soft * codebook_KD.abs().max().item(),
        "grad_codebook": soft * vectors * z_ND.abs().max().item()
        + unit * vectors * gradient_ND.abs().max().item(),
    }


def test_terms_are_the_entropies_of_their_distributions():
    """Four vectors, each sure of a row of its own: no doubt a vector, two bits of use."""
    z_ND = torch.eye(4, dtype=torch.float64)
    exact = EntropySettings(eps=0.0)
    terms = quantize(z_ND, codebook_KD=torch.eye(8, 4).double(), entropy=exact).entropy
    assert terms is not None
    assert terms.sample.item() == pytest.approx(0, abs=1e-12)
    assert terms.codebook.item() == pytest.approx(math.log(4))
    # All rows alike: every vector is in doubt about all of them.
    terms = quantize(z_ND, codebook_KD=torch.ones(8, 4).double(), entropy=exact).entropy
    assert terms is not None
    assert terms.sample.item() == pytest.approx(math.log(8))
    assert terms.codebook.item() == pytest.approx(math.log(8))
    assert terms.loss(sample_weight=2.0, codebook_weight=0.5).item() == pytest.approx(
        1.5 * math.log(8)
    )


def test_gradients_are_those_of_finite_differences():
    inputs = drawn(vectors=5, rows=13, dim=4, scale=0.3, seed=1, dtype=torch.float64)

    def loss(z_ND, codebook_KD):
        entropy = EntropySettings(temperature=0.2)
        terms = quantize(z_ND, codebook_KD=codebook_KD, entropy=entropy, chunk=5).entropy
        assert terms is not None
        return terms.loss(sample_weight=0.7, codebook_weight=1.3)

    watched = (inputs["z_ND"].requires_grad_(), inputs["codebook_KD"].requires_grad_())
    assert torch.autograd.gradcheck(loss, watched)


def test_descending_on_the_term_spreads_sure_choices_over_the_codebook():
    torch.manual_seed(0)
    z_ND = torch.randn(64, 8) + 2  # so far from the origin that a few rows win everywhere
    codebook_KD = (0.02 * torch.randn(16, 8)).requires_grad_()
    optimizer = torch.optim.Adam([codebook_KD], lr=0.02)
    seen = []
    for _ in range(60):
        found = quantize(z_ND, codebook_KD=codebook_KD, entropy=EntropySettings(temperature=0.1))
        assert found.entropy is not None
        seen.append((len(found.codes_N.unique()), found.entropy.sample.item()))
        optimizer.zero_grad()
        found.entropy.loss().backward()
        optimizer.step()
    (used_first, doubt_first), (used_last, doubt_last) = seen[0], seen[-1]
    assert used_first <= 8
    assert used_last > used_first + 4
    assert doubt_last < doubt_first / 2


@pytest.mark.parametrize("size", [1e2, 1e4, 1e15])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_extreme_logits_yield_numbers(monkeypatch, size, eps, chunk, share):
    """Of logits up to 1e30, with a tie, a row of zeros and rows that nobody comes near."""
    monkeypatch.setattr(sharp, "CANDIDATE_SHARE", share)
    codebook_KD = size * torch.tensor(
        [[5.0, 1.0], [-4.0, 9.0], [5.0, 1.0], [0.0, 0.0], [-1.0, -1.0]]
    )
    z_ND = size * torch.tensor([[3.0, -2.0], [0.0, 0.0], [1e-20, 0.0]])
    found = entropies(
        quantize,
        z_ND=z_ND,
        codebook_KD=codebook_KD,
        entropy=EntropySettings(eps=eps),
        gradient_ND=torch.ones_like(z_ND),
        chunk=chunk,
    )
    for field in fields(Found):
        assert torch.isfinite(getattr(found, field.name)).all(), field.name
    for value in (found.sample, found.codebook):
        assert -1e-4 <= value.item() <= math.log(5) + 1e-4


def test_entropies_cost_nothing_unless_asked_for():
    module = Quantizer(32, dim=4)
    grid_BDHW = torch.randn(2, 4, 3, 5)
    assert module(grid_BDHW).entropy is None
    asked = module(grid_BDHW, entropy=EntropySettings()).entropy
    assert asked is not None
    assert asked.sample.shape == asked.codebook.shape == ()


@pytest.mark.parametrize("enabled", [True, False])
def test_entropies_are_computed_in_full_precision_under_autocast(enabled):
    """Backward within autocast too, where a matrix product would else be one of bf16."""
    inputs = drawn(vectors=20, rows=30, dim=8, scale=1.0, seed=3, dtype=torch.float32)
    exact = {name: value.double() for name, value in inputs.items()}
    expected = entropies(quantize_plain, **exact, entropy=EntropySettings(temperature=1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        found = entropies(quantize, **inputs, entropy=EntropySettings(temperature=1.0))
    for field in fields(Found):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
