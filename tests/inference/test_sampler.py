"""The sampler: which candidates remain, and that draws follow their probabilities."""

from dataclasses import replace

import pytest
import torch

from emu35.errors import CheckpointError
from emu35.inference.sampler import (
    EVERYTHING,
    Drawn,
    draw,
    guide,
    restrict,
    sampling_problems,
)
from emu35.tokens.template import Sampling


def sampling(**numbers: float) -> Sampling:
    return replace(EVERYTHING, **numbers)  # type: ignore[arg-type]


def survivors(scores: list[float], **numbers: float) -> set[int]:
    scores_1M, columns_1M = restrict(torch.tensor([scores]), sampling=sampling(**numbers))
    return set(columns_1M[torch.isfinite(scores_1M)].tolist())


def drawn(
    scores_NV: torch.Tensor, *, seeds: list[int], position: int = 0, top: int = 0, **numbers: float
) -> Drawn:
    return draw(
        scores_NV,
        sampling=sampling(**numbers),
        seeds_N=torch.tensor(seeds),
        positions_N=torch.full((len(seeds),), position),
        top=top,
    )


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


def test_ties_at_the_edge_of_the_nucleus_stay_together() -> None:
    scores = torch.tensor([0.4, 0.2, 0.2, 0.2]).log().tolist()
    assert survivors(scores, top_p=0.5) == {0, 1, 2, 3}
    assert survivors(scores, top_p=0.3) == {0}
    assert survivors([*scores, -9.0], top_p=0.5, top_k=4) == {0, 1, 2, 3}


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
    choices = drawn(probabilities.log().expand(4000, -1), seeds=list(range(4000)), top_k=3)
    shares = torch.bincount(choices.columns_N, minlength=4) / 4000
    # Four standard deviations of a binomial share over 4000 draws are at most 0.032.
    assert (shares - torch.tensor([0.4, 0.3, 0.2, 0.0]) / 0.9).abs().max() < 0.032


def test_positions_of_one_sequence_draw_afresh() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    counts = torch.zeros(4)
    for position in range(2000):
        counts[drawn(probabilities.log()[None], seeds=[7], position=position).columns_N] += 1
    # Four standard deviations over 2000 draws are at most 0.045.
    assert (counts / 2000 - probabilities).abs().max() < 0.045


def test_a_row_draws_the_same_alone_and_in_company() -> None:
    torch.manual_seed(1)
    scores_NV = torch.randn(5, 40)
    together = drawn(scores_NV, seeds=[0, 1, 2, 3, 4], top_k=20, top_p=0.9).columns_N
    order = [3, 1, 4, 0, 2]
    shuffled = drawn(scores_NV[order], seeds=order, top_k=20, top_p=0.9).columns_N
    alone = [
        drawn(scores_NV[n : n + 1], seeds=[n], top_k=20, top_p=0.9).columns_N.item()
        for n in range(5)
    ]
    assert together.tolist() == alone
    assert shuffled.tolist() == [alone[n] for n in order]


def test_greedy_takes_the_best_whatever_the_seed() -> None:
    scores_NV = torch.tensor([[0.0, 2.0, 1.0]])
    choices = [drawn(scores_NV, seeds=[seed], temperature=0).columns_N.item() for seed in range(9)]
    assert choices == [1] * 9


def test_log_probabilities_are_those_of_the_restricted_distribution() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
    found = drawn(probabilities.log(), seeds=[1, 2], top_k=2, top=4)
    kept = torch.tensor([[0.5, 0.3, 0.0, 0.0], [0.0, 0.0, 0.3, 0.4]])
    expected = (kept / kept.sum(-1, keepdim=True)).log()
    torch.testing.assert_close(found.logprobs_N, expected.gather(1, found.columns_N[:, None])[:, 0])
    assert found.support_N.tolist() == [2, 2]
    assert found.top_columns_NT[:, :2].tolist() == [[0, 1], [3, 2]]
    torch.testing.assert_close(found.top_logprobs_NT[:, :2], expected.topk(2).values)


def test_greedy_reports_the_log_probability_of_temperature_one() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2]])
    found = drawn(probabilities.log(), seeds=[0], temperature=0, top_k=1, top=3)
    torch.testing.assert_close(found.logprobs_N, torch.tensor([0.5]).log())
    torch.testing.assert_close(found.top_logprobs_NT, probabilities.log())
    assert found.support_N.tolist() == [1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_diverged_weights_are_named_not_sampled(bad: float, temperature: float) -> None:
    with pytest.raises(CheckpointError, match="diverged"):
        drawn(torch.tensor([[0.0, bad, 1.0]]), seeds=[0], temperature=temperature)


def test_numbers_that_make_no_sense_are_all_named() -> None:
    problems = sampling_problems(sampling(temperature=-1, top_k=-5, top_p=0), name="image")
    assert len(problems) == 3
    assert all(problem.startswith("image ") for problem in problems)
