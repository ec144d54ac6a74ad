"""Steps of denoising with an oracle in the network's place, which knows what there is to know: the
probability of every clean code given the noisy one."""

from dataclasses import dataclass, field

import pytest
import torch

from emu35.config.dida import PathConfig, PathKind
from emu35.dida.path import Path, build_path
from emu35.dida.samplers import (
    Prediction,
    Sampler,
    Step,
    advance,
    begin,
    draw_seed,
    entropy,
)
from emu35.dida.times import schedule
from emu35.parallel.noise import gumbel

CODES = 8


def toy_path(kind: PathKind) -> Path:
    """Eight codes on a circle, unevenly."""
    angles_K = torch.tensor([0.0, 0.3, 0.9, 1.6, 2.6, 3.3, 4.2, 5.4])
    codebook_KD = torch.stack([angles_K.cos(), angles_K.sin()], 1)
    return build_path(PathConfig(kind=kind), codebook_KD=codebook_KD)


@dataclass(kw_only=True)
class Sampled:
    """What came of a run, and how many codes were accepted after each step."""

    codes_N: torch.Tensor
    accepted: list[int] = field(default_factory=list[int])


def sample(
    sampler: Sampler,
    *,
    kind: PathKind,
    truth_NK: torch.Tensor,
    steps: int,
    seed: int = 0,
    first: int = 0,
    told: bool = True,
) -> Sampled:
    """Denoise N codes that are independent of each other, with the probabilities ``truth_NK``. A
    network that is not ``told`` which codes are accepted takes all of them for noisy, as noisy as
    the canvas looks."""
    path = toy_path(kind)
    positions_N = torch.arange(first, first + len(truth_NK))
    states_N = begin(path, seed=seed, positions_N=positions_N)
    accepted_N = torch.zeros(len(truth_NK), dtype=torch.bool)
    times = schedule(steps, shift=1.0).tolist()
    sampled = Sampled(codes_N=states_N)
    for number in range(steps):
        step = Step(number=number, count=steps, time=times[number], next=times[number + 1])
        time = step.time
        if not told:
            time = apparent_time(
                path, truth_NK[0], time=time, accepted=float(accepted_N.float().mean())
            )
        scores_NK = oracle(path, truth_NK=truth_NK, states_N=states_N, time=time)
        known_NK = torch.full_like(scores_NK, -torch.inf)
        known_NK[:, :].scatter_(1, states_N.clamp(max=CODES - 1)[:, None], 0.0)
        scores_NK = torch.where(accepted_N[:, None] & told, known_NK, scores_NK)
        noise_NK = gumbel(
            torch.full_like(positions_N, draw_seed(seed, step=step)),
            positions_N=positions_N,
            ids_NM=torch.arange(CODES)[None],
        )
        codes_N = (scores_NK + noise_NK).argmax(1)
        advanced = advance(
            sampler,
            path=path,
            states_N=states_N,
            accepted_N=accepted_N,
            prediction=Prediction(
                codes_N=codes_N,
                logprobs_N=scores_NK.log_softmax(1).gather(1, codes_N[:, None])[:, 0],
                entropies_N=entropy(scores_NK),
            ),
            step=step,
            seed=seed,
            positions_N=positions_N,
        )
        kept_N = accepted_N & advanced.accepted_N & ~advanced.taken_N
        assert torch.equal(advanced.states_N[kept_N], states_N[kept_N]), "accepted codes stay"
        assert torch.equal(advanced.states_N[advanced.taken_N], codes_N[advanced.taken_N])
        states_N, accepted_N = advanced.states_N, advanced.accepted_N
        sampled.accepted.append(int(accepted_N.sum()))
    assert bool(accepted_N.all())
    assert bool((states_N < CODES).all()), "no mask is left"
    sampled.codes_N = states_N
    return sampled


def oracle(
    path: Path, *, truth_NK: torch.Tensor, states_N: torch.Tensor, time: float
) -> torch.Tensor:
    """log p(x1 | x_t), up to a constant a row: that of x1 and that of its noise being x_t."""
    noise_KS = path.probabilities(torch.arange(CODES), times_N=torch.full((CODES,), time))
    return truth_NK.log() + noise_KS.t()[states_N].log()


def apparent_time(path: Path, truth_K: torch.Tensor, *, time: float, accepted: float) -> float:
    """The time at which as many codes are clean as on a canvas of which the share ``accepted`` is
    clean and the rest is at ``time``."""

    def clean(at: float) -> float:
        kept_KS = path.probabilities(torch.arange(CODES), times_N=torch.full((CODES,), at))
        return float((kept_KS.diagonal() * truth_K).sum())

    times = torch.linspace(0, 0.9999, 2000).tolist()
    wanted = accepted + (1 - accepted) * clean(time)
    return min(times, key=lambda at: abs(clean(at) - wanted))


def variation(codes_N: torch.Tensor, truth_K: torch.Tensor) -> float:
    """Total variation between the codes' shares and ``truth_K``."""
    shares_K = codes_N.bincount(minlength=CODES) / len(codes_N)
    return float((shares_K - truth_K).abs().sum() / 2)


UNEVEN = torch.tensor([0.3, 0.02, 0.18, 0.05, 0.25, 0.1, 0.04, 0.06])


def many(sampler: Sampler, kind: PathKind, *, steps: int) -> float:
    """Total variation of 20,000 codes, of which exact draws are off by 0.007 on average."""
    made = sample(sampler, kind=kind, truth_NK=UNEVEN.repeat(20_000, 1), steps=steps)
    return variation(made.codes_N, UNEVEN)


@pytest.mark.parametrize(
    ("sampler", "kind"),
    [
        *((Sampler.remdm, kind) for kind in PathKind),
        (Sampler.kinetic_euler, PathKind.mixture_uniform),
        (Sampler.kinetic_euler, PathKind.absorbing),
        (Sampler.entropy_bound, PathKind.absorbing),
    ],
)
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_single_codes_are_distributed_as_the_network_says(
    sampler: Sampler, kind: PathKind, steps: int
) -> None:
    assert many(sampler, kind, steps=steps) < 0.015


def test_on_the_metric_path_the_error_is_that_of_euler_steps() -> None:
    found = [many(Sampler.kinetic_euler, PathKind.metric, steps=steps) for steps in (8, 25, 100)]
    assert found[0] < 0.12
    assert found[1] < 0.04
    assert found[2] < 0.015
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    "kind", [PathKind.mixture_uniform, pytest.param(PathKind.metric, marks=pytest.mark.slow)]
)
def test_without_a_mask_remdm_errs_where_the_network_must_read_the_noise_off_the_canvas(
    kind: PathKind,
) -> None:
    truth_NK = UNEVEN.repeat(20_000, 1)
    made = sample(Sampler.remdm, kind=kind, truth_NK=truth_NK, steps=25, told=False)
    assert 0.05 < variation(made.codes_N, UNEVEN) < 0.12


def test_maskgit_prefers_likely_codes() -> None:
    made = sample(
        Sampler.maskgit, kind=PathKind.absorbing, truth_NK=UNEVEN.repeat(5000, 1), steps=8
    )
    share = float((made.codes_N == 0).float().mean())
    assert share > UNEVEN[0] + 0.02


@pytest.mark.parametrize("kind", list(PathKind))
@pytest.mark.parametrize("sampler", list(Sampler))
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_certain_oracle_gets_its_picture(sampler: Sampler, kind: PathKind, steps: int) -> None:
    picture_N = torch.randint(CODES, (60,), generator=torch.Generator().manual_seed(3))
    truth_NK = torch.nn.functional.one_hot(picture_N, CODES).float()
    made = sample(sampler, kind=kind, truth_NK=truth_NK, steps=steps)
    assert torch.equal(made.codes_N, picture_N)


def test_the_entropy_bound_accepts_one_at_least_and_all_that_are_certain() -> None:
    flat_NK = torch.full((40, CODES), 1 / CODES)
    slow = sample(Sampler.entropy_bound, kind=PathKind.absorbing, truth_NK=flat_NK, steps=40)
    gains = [b - a for a, b in zip([0, *slow.accepted], slow.accepted, strict=False)]
    assert gains == [1] * 40, "ln 8 nats each: two at once break the bound"
    certain_NK = torch.nn.functional.one_hot(torch.arange(40) % CODES, CODES).float()
    mixed_NK = torch.where(torch.arange(40)[:, None] < 30, certain_NK, flat_NK)
    fast = sample(Sampler.entropy_bound, kind=PathKind.absorbing, truth_NK=mixed_NK, steps=40)
    assert fast.accepted[0] == 31, "the certain ones and one more"
    hurried = sample(Sampler.entropy_bound, kind=PathKind.absorbing, truth_NK=flat_NK, steps=4)
    assert hurried.accepted == [10, 20, 30, 40], "the steps that are left share what is left"


def test_maskgit_follows_the_cosine_and_remdm_the_time() -> None:
    truth_NK = UNEVEN.repeat(2000, 1)
    made = sample(Sampler.maskgit, kind=PathKind.absorbing, truth_NK=truth_NK, steps=4)
    assert made.accepted == [153, 586, 1235, 2000]
    made = sample(Sampler.remdm, kind=PathKind.absorbing, truth_NK=truth_NK, steps=4)
    for accepted, share in zip(made.accepted, (0.25, 0.5, 0.75, 1.0), strict=True):
        assert accepted / 2000 == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize(("time", "following"), [(0.5, 0.52), (0.95, 0.98)])
def test_remdm_gives_a_capped_share_of_what_it_accepted_up_again(
    time: float, following: float
) -> None:
    codes_N = torch.zeros(20_000, dtype=torch.int64)
    advanced = advance(
        Sampler.remdm,
        path=toy_path(PathKind.absorbing),
        states_N=codes_N,
        accepted_N=torch.ones_like(codes_N, dtype=torch.bool),
        prediction=Prediction(codes_N=codes_N, logprobs_N=torch.zeros(20_000)),
        step=Step(number=1, count=4, time=time, next=following),
        seed=0,
        positions_N=torch.arange(20_000),
    )
    given_up = float((~advanced.accepted_N).float().mean())
    assert given_up == pytest.approx(min(0.04, (1 - following) / time), abs=0.005)
    assert bool((advanced.states_N[~advanced.accepted_N] == CODES).all()), "they are masked again"


@pytest.mark.parametrize("sampler", [Sampler.kinetic_euler, Sampler.remdm])
def test_codes_are_drawn_by_place_and_not_by_batch(sampler: Sampler) -> None:
    """What the samplers that look at each code alone make of part of a picture."""
    truth_NK = UNEVEN.repeat(50, 1)
    whole = sample(sampler, kind=PathKind.metric, truth_NK=truth_NK, steps=6, seed=9)
    part = sample(sampler, kind=PathKind.metric, truth_NK=truth_NK[20:], steps=6, seed=9, first=20)
    assert torch.equal(whole.codes_N[20:], part.codes_N)
    other = sample(sampler, kind=PathKind.metric, truth_NK=truth_NK, steps=6, seed=10)
    assert not torch.equal(whole.codes_N, other.codes_N)


def test_entropy_in_nats() -> None:
    scores_NK = torch.tensor([[0.0, 0.0, -torch.inf], [5.0, -torch.inf, -torch.inf]])
    torch.testing.assert_close(entropy(scores_NK), torch.tensor([0.6931472, 0.0]))
