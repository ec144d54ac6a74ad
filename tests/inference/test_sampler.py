"""The sampler: which candidates remain, and that draws follow their probabilities."""

from dataclasses import replace

import pytest
import torch

from emu35.errors import CheckpointError
from emu35.inference.sampler import EVERYTHING, draw, guide, restrict, sampling_problems
from emu35.tokens.template import Sampling


def sampling(**numbers: float) -> Sampling:
    return replace(EVERYTHING, **numbers)  # type: ignore[arg-type]


def survivors(scores: list[float], **numbers: float) -> set[int]:
    scores_1M, columns_1M = restrict(torch.tensor([scores]), sampling=sampling(**numbers))
    return set(columns_1M[torch.isfinite(scores_1M)].tolist())


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_top_k_keeps_ties() -> None:
    assert survivors([1.0, 3.0, 2.0, 2.0, 0.0], top_k=2) == {1, 2, 3}
    assert survivors([1.0, 3.0, 2.0, 2.0, 0.0], top_k=0) == {0, 1, 2, 3, 4}
    assert survivors([1.0, 3.0], top_k=9) == {0, 1}


def test_top_p_keeps_the_candidate_that_crosses_the_line() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert survivors(scores, top_p=0.4) == {0}
    assert survivors(scores, top_p=0.6) == {0, 1}
    assert survivors(scores, top_p=0.9) == {0, 1, 2}
    assert survivors(scores, top_p=1e-6) == {0}


def test_temperature_comes_before_top_p() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    # A hot temperature flattens the distribution, so more candidates are needed to gather top_p.
    assert survivors(scores, top_p=0.6, temperature=10.0) == {0, 1, 2}


def test_rows_with_different_numbers_of_ties_do_not_disturb_each_other() -> None:
    scores_NV = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    scores_NM, columns_NM = restrict(scores_NV, sampling=sampling(top_k=2))
    kept = [set(c[torch.isfinite(s)].tolist()) for s, c in zip(scores_NM, columns_NM, strict=True)]
    assert kept == [{0, 1, 2, 3}, {0, 1}]


def test_guidance_extrapolates_log_probabilities() -> None:
    torch.manual_seed(0)
    c_NV, u_NV = torch.randn(2, 7), torch.randn(2, 7)
    log_c, log_u = c_NV.log_softmax(-1), u_NV.log_softmax(-1)
    torch.testing.assert_close(guide(c_NV, unconditional_NV=u_NV, scale=1.0), log_c)
    torch.testing.assert_close(guide(c_NV, unconditional_NV=u_NV, scale=0.0), log_u)
    scale_N1 = torch.tensor([[5.0], [2.0]])
    torch.testing.assert_close(
        guide(c_NV, unconditional_NV=u_NV, scale=scale_N1),
        scale_N1 * log_c - (scale_N1 - 1) * log_u,
    )


def test_draws_follow_the_restricted_distribution() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    generator = generators(7)
    scores_1V = probabilities.log()[None]
    numbers = sampling(top_k=3)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[draw(scores_1V, sampling=numbers, generators=generator)] += 1
    expected = torch.tensor([0.4, 0.3, 0.2, 0.0]) / 0.9
    # Four standard deviations of a binomial share over 4000 draws are at most 0.032.
    assert (counts / 4000 - expected).abs().max() < 0.032


def test_a_row_draws_the_same_alone_and_in_company() -> None:
    torch.manual_seed(1)
    scores_NV = torch.randn(5, 40)
    numbers = sampling(top_k=20, top_p=0.9)
    together = draw(scores_NV, sampling=numbers, generators=generators(*range(5)))
    order = [3, 1, 4, 0, 2]
    shuffled = draw(scores_NV[order], sampling=numbers, generators=generators(*order))
    alone = [
        draw(scores_NV[n : n + 1], sampling=numbers, generators=generators(n)).item()
        for n in range(5)
    ]
    assert together.tolist() == alone
    assert shuffled.tolist() == [alone[n] for n in order]


def test_greedy_takes_the_best_and_no_randomness() -> None:
    scores_NV = torch.tensor([[0.0, 2.0, 1.0]])
    generator = generators(3)
    before = generator[0].get_state()
    assert draw(scores_NV, sampling=sampling(temperature=0), generators=generator).tolist() == [1]
    assert torch.equal(before, generator[0].get_state())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_diverged_weights_are_named_not_sampled(bad: float, temperature: float) -> None:
    with pytest.raises(CheckpointError, match="diverged"):
        draw(
            torch.tensor([[0.0, bad, 1.0]]),
            sampling=sampling(temperature=temperature),
            generators=generators(0),
        )


def test_numbers_that_make_no_sense_are_all_named() -> None:
    problems = sampling_problems(sampling(temperature=-1, top_k=-5, top_p=0), name="image")
    assert len(problems) == 3
    assert all(problem.startswith("image ") for problem in problems)
