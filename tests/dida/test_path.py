"""Probability paths: draws follow the definition, jumps follow the path, parts do not matter."""

from itertools import pairwise

import pytest
import torch

from emu35.config import PathConfig, PathKind
from emu35.dida import path as path_module
from emu35.dida.path import MetricPath, Path, build_path
from emu35.dida.times import picture_shift, schedule, shifted, training_times

K = 24
DRAWS = 20_000


def codebook(codes: int = K, dim: int = 6) -> torch.Tensor:
    return torch.randn(codes, dim, generator=torch.Generator().manual_seed(3))


def path_of(kind: PathKind) -> Path:
    return build_path(PathConfig(kind=kind), codebook_KD=codebook())


def shares(states_N: torch.Tensor, *, states: int) -> torch.Tensor:
    return torch.bincount(states_N, minlength=states).double() / len(states_N)


def alike(values: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Total variation within what as many draws from the distribution itself show: its mean is at
    most sqrt(K / 2 pi n), and 3 / sqrt(n) covers its spread."""
    bound = (len(probabilities) / (6.28 * DRAWS)) ** 0.5 + 3 / DRAWS**0.5
    assert (values - probabilities).abs().sum() / 2 < bound


def many(value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.full((DRAWS,), value, dtype=dtype)


@pytest.mark.parametrize("kind", list(PathKind))
@pytest.mark.parametrize("time", [0.0, 0.3, 0.8, 0.999])
def test_draws_have_the_probabilities_of_the_definition(kind: PathKind, time: float) -> None:
    path = path_of(kind)
    code = many(5, torch.int64)
    drawn_N = path.draw(
        code, times_N=many(time), seeds_N=many(1, torch.int64), positions_N=torch.arange(DRAWS)
    )
    expected = path.probabilities(code[:1], times_N=many(time)[:1])[0].double()
    assert expected.sum() == pytest.approx(1.0, rel=1e-5)
    alike(shares(drawn_N, states=path.states), expected)


def test_the_metric_path_is_uniform_at_first_and_prefers_near_codes_later() -> None:
    path = path_of(PathKind.metric)
    assert isinstance(path, MetricPath)
    code = torch.tensor([7])
    first, middle, late = (
        path.probabilities(code, times_N=torch.tensor([time]))[0] for time in (0.0, 0.5, 0.999)
    )
    torch.testing.assert_close(first, torch.full((K,), 1 / K))
    order = path.distances(code)[0].argsort()
    assert (middle[order].diff() <= 0).all()
    assert late[7] > 0.999
    unit = torch.nn.functional.normalize(codebook(), dim=1)
    by_hand = (unit - unit[7]).square().sum(1)
    torch.testing.assert_close(path.distances(code)[0], by_hand, rtol=1e-5, atol=1e-5)
    softmax = torch.softmax(-3.0 * (0.5 / 0.5) ** 0.9 * by_hand, 0)
    torch.testing.assert_close(middle, softmax, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", list(PathKind))
def test_a_draw_does_not_depend_on_what_is_drawn_with_it(
    kind: PathKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = path_of(kind)
    codes_N = torch.arange(60) % K
    numbers = {
        "times_N": torch.linspace(0, 0.99, 60, dtype=torch.float64),
        "seeds_N": torch.full((60,), 9),
        "positions_N": torch.arange(60) * 3,
    }
    together = path.draw(codes_N, **numbers)
    monkeypatch.setattr(path_module, "SCORES", 5 * K)
    assert torch.equal(path.draw(codes_N, **numbers), together)
    alone = [
        path.draw(codes_N[n : n + 1], **{name: v[n : n + 1] for name, v in numbers.items()})
        for n in range(60)
    ]
    assert torch.equal(torch.cat(alone), together)
    assert not torch.equal(
        path.draw(codes_N, **(numbers | {"seeds_N": torch.full((60,), 8)})), together
    )


def walk(path: Path, *, steps: int, until: float) -> torch.Tensor:
    """States of tokens whose x1 is 5, brought from noise to time ``until`` step by step."""
    code = many(5, torch.int64)
    states_N = path.draw(
        code, times_N=many(0.0), seeds_N=many(2, torch.int64), positions_N=torch.arange(DRAWS)
    )
    times = torch.linspace(0, until, steps + 1, dtype=torch.float64)
    for step in range(steps):
        states_N = path.jump(
            states_N,
            codes_N=code,
            times_N=many(times[step].item()),
            next_N=many(times[step + 1].item()),
            seeds_N=many(100 + step, torch.int64),
            positions_N=torch.arange(DRAWS),
        )
    return states_N


@pytest.mark.parametrize("kind", [PathKind.mixture_uniform, PathKind.absorbing])
def test_jumps_of_a_mixture_follow_its_path_exactly(kind: PathKind) -> None:
    path = path_of(kind)
    expected = path.probabilities(torch.tensor([5]), times_N=torch.tensor([0.6]))[0].double()
    alike(shares(walk(path, steps=3, until=0.6), states=path.states), expected)


def euler_chain(path: MetricPath, *, steps: int, until: float) -> torch.Tensor:
    """The exact distribution, fp64 [K], of :func:`walk`: a matrix of jumps a step, written as loops
    over the definition."""
    distances_K = path.distances(torch.tensor([5]))[0].double()
    state_K = torch.full((K,), 1 / K, dtype=torch.float64)
    times = torch.linspace(0, until, steps + 1, dtype=torch.float64)
    for now, then in pairwise(times.tolist()):
        beta, grown = (3.0 * (t / (1 - t)) ** 0.9 for t in (now, then))
        probabilities_K = torch.softmax(-beta * distances_K, 0)
        moved_K = torch.zeros(K, dtype=torch.float64)
        for here in range(K):
            nearer_K = (distances_K[here] - distances_K).clamp(min=0)
            rates_K = probabilities_K * (grown - beta) * nearer_K
            jumps = 1 - torch.exp(-rates_K.sum())
            moved_K[here] += state_K[here] * (1 - jumps)
            if jumps > 0:
                moved_K += state_K[here] * jumps * rates_K / rates_K.sum()
        state_K = moved_K
    return state_K


@pytest.mark.parametrize(("steps", "bound"), [(8, 0.06), (25, 0.02), (100, 0.006)])
def test_jumps_of_the_metric_path_are_the_euler_steps_and_those_follow_the_path(
    steps: int, bound: float
) -> None:
    """In total variation; the error of the steps falls as one over their number."""
    path = path_of(PathKind.metric)
    assert isinstance(path, MetricPath)
    chain_K = euler_chain(path, steps=steps, until=0.7)
    alike(shares(walk(path, steps=steps, until=0.7), states=K), chain_K)
    exact_K = path.probabilities(torch.tensor([5]), times_N=torch.tensor([0.7]))[0].double()
    assert (chain_K - exact_K).abs().sum() / 2 < bound


@pytest.mark.parametrize("kind", list(PathKind))
def test_the_last_step_takes_what_was_predicted(kind: PathKind) -> None:
    path = path_of(kind)
    codes_N = torch.arange(K)
    ended = path.jump(
        torch.zeros_like(codes_N),
        codes_N=codes_N,
        times_N=torch.full((K,), 0.9, dtype=torch.float64),
        next_N=torch.ones(K, dtype=torch.float64),
        seeds_N=torch.zeros_like(codes_N),
        positions_N=codes_N,
    )
    assert torch.equal(ended, codes_N)


def test_times_run_from_noise_to_the_picture_and_a_shift_lingers_at_noise() -> None:
    plain, late = schedule(10, shift=1.0), schedule(10, shift=3.0)
    torch.testing.assert_close(plain, torch.linspace(0, 1, 11, dtype=torch.float64))
    assert (late[0], late[-1]) == (0.0, 1.0)
    assert (late[1:-1] < plain[1:-1]).all()
    assert (late.diff() > 0).all()
    for shift in (0.1, 0.3, 0.7, 2.3):
        bent = schedule(25, shift=shift)
        assert (bent[0], bent[-1]) == (0.0, 1.0), "not beyond the ends by a bit"
        assert (bent.diff() > 0).all()
    uniform = torch.tensor([1e-9, 0.5, 1 - 1e-9], dtype=torch.float64)
    drawn = training_times(uniform, shifts_N=torch.ones(3, dtype=torch.float64))
    assert drawn[0] == pytest.approx(0.0, abs=1e-6)
    assert drawn[2] == pytest.approx(0.999, abs=1e-6)
    assert shifted(torch.tensor(0.5), shift=3.0) == pytest.approx(1 - 1.5 / 2)
    assert picture_shift(4096, shift=1.0, reference_codes=1024) == 2.0
    assert picture_shift(4096, shift=1.5, reference_codes=0) == 1.5
