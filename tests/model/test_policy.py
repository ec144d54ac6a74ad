"""Replayed log-probabilities against the plain formula over full logits, values and gradients."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_lm

from emu35.model.build import build_model
from emu35.model.init import initialize
from emu35.model.policy import Choices, LegalSet, policy_logprobs
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import single_process_mesh

SIZE = 67
SETS: list[LegalSet] = [((0, SIZE),), ((40, SIZE),), ((3, 9), (12, 13), (20, 40)), ((5, 7),)]


def tiny_model() -> Emu35Model:
    single_process_mesh()
    model = build_model(tiny_lm(init_std=0.4), vocabulary_size=SIZE)
    initialize(model, seed=5, pad_id=0)
    return model


def ids_of(legal: LegalSet) -> list[int]:
    return [id for start, end in legal for id in range(start, end)]


@st.composite
def choices(draw: st.DrawFn) -> Choices:
    count = draw(st.integers(1, 7))
    legal = [draw(st.integers(0, len(SETS) - 1)) for _ in range(count)]
    ids: list[int] = []
    kept: list[list[int]] = []
    for number in legal:
        possible = ids_of(SETS[number])
        some = draw(st.one_of(st.none(), st.sets(st.sampled_from(possible), min_size=1)))
        kept.append(sorted(some) if some is not None else [])
        ids.append(draw(st.sampled_from(kept[-1] or possible)))
    return Choices(
        ids_N=torch.tensor(ids, dtype=torch.int64),
        temperature_N=torch.tensor(
            [draw(st.sampled_from([0.3, 1.0, 1.7])) for _ in range(count)], dtype=torch.float32
        ),
        sets=SETS,
        legal_N=torch.tensor(legal, dtype=torch.int64),
        candidates_F=torch.tensor([id for ids in kept for id in ids], dtype=torch.int64),
        ends_N=torch.tensor([len(ids) for ids in kept], dtype=torch.int64).cumsum(0),
    )


def plainly(
    logits_NV: torch.Tensor, guided_NV: torch.Tensor, given: Choices
) -> Sequence[torch.Tensor]:
    """Row by row in the obvious way."""
    chosen, plain, entropy = [], [], []
    begin = 0
    for row in range(len(given)):
        end = int(given.ends_N[row])
        kept = given.candidates_F[begin:end].tolist() or ids_of(SETS[int(given.legal_N[row])])
        begin = end
        scores = (guided_NV[row] / given.temperature_N[row])[kept].log_softmax(0)
        chosen.append(scores[kept.index(int(given.ids_N[row]))])
        entropy.append(-(scores.exp() * scores).sum())
        plain.append(logits_NV[row].log_softmax(0)[given.ids_N[row]])
    return [
        torch.stack(values) if values else logits_NV.new_empty(0)
        for values in (chosen, plain, entropy)
    ]


@settings(max_examples=60, deadline=None)
@given(given=choices(), guided=st.booleans(), chunk=st.integers(1, 5), seed=st.integers(0, 99))
def test_replay_equals_the_plain_formula(
    given: Choices, guided: bool, chunk: int, seed: int
) -> None:
    model = tiny_model()
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    hidden_NH, other_NH = (
        torch.randn(len(given), width, generator=generator, requires_grad=True) for _ in range(2)
    )
    weights_3N = torch.randn(3, len(given), generator=generator)
    found = policy_logprobs(
        model,
        hidden_NH=hidden_NH,
        guided_NH=other_NH if guided else None,
        choices=given,
        chunk=chunk,
    )
    values = (found.chosen_N, found.plain_N, found.entropy_N)
    weight = model.output_weight
    wrt = [hidden_NH, other_NH, weight] if guided else [hidden_NH, weight]
    total = torch.stack([(w * v).sum() for w, v in zip(weights_3N, values, strict=True)]).sum()
    gradients = torch.autograd.grad(total, wrt)
    rows_VH = weight[:SIZE]
    logits_NV = hidden_NH @ rows_VH.t()
    expected = plainly(logits_NV, other_NH @ rows_VH.t() if guided else logits_NV, given)
    for value, wanted in zip(values, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    total = torch.stack([(w * v).sum() for w, v in zip(weights_3N, expected, strict=True)]).sum()
    for gradient, wanted in zip(gradients, torch.autograd.grad(total, wrt), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_what_was_no_candidate_gets_no_probability() -> None:
    """Two candidates with equal logits share everything, whatever the other ids say."""
    model = tiny_model()
    hidden_1H = torch.zeros(1, model.config.hidden_size)
    given = Choices(
        ids_N=torch.tensor([8]),
        temperature_N=torch.ones(1),
        sets=SETS,
        legal_N=torch.tensor([2]),
        candidates_F=torch.tensor([8, 12]),
        ends_N=torch.tensor([2]),
    )
    found = policy_logprobs(model, hidden_NH=hidden_1H, choices=given)
    assert float(found.chosen_N) == pytest.approx(-0.693147, abs=1e-6)
    assert float(found.entropy_N) == pytest.approx(0.693147, abs=1e-6)
    assert float(found.plain_N) == pytest.approx(-4.204693, abs=1e-5)  # log of 67


def test_a_micro_batch_of_padding_gives_nothing() -> None:
    model = tiny_model()
    hidden_0H = torch.zeros(0, model.config.hidden_size, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    empty = Choices(
        ids_N=none,
        temperature_N=torch.empty(0),
        sets=SETS,
        legal_N=none,
        candidates_F=none,
        ends_N=none,
    )
    found = policy_logprobs(model, hidden_NH=hidden_0H, choices=empty)
    (found.chosen_N.sum() + found.plain_N.sum()).backward()
    assert found.entropy_N.shape == (0,)
    assert model.output_weight.grad is not None
    assert not model.output_weight.grad.any()
