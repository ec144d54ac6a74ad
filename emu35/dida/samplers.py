"""One step of denoising: from what the network predicts of a canvas to the next canvas.

The network has predicted, for every code of a picture, a distribution of the clean code x1, and one
x1 was drawn from each. The samplers differ in what they do with it:

==============  ================================================================================
kinetic_euler   every code may move, by :meth:`~emu35.dida.path.Path.jump` (arXiv 2510.24717)
entropy_bound   accepts the codes of least entropy, as many as keep the error of drawing them
                independently below a bound (arXiv 2505.24857, section 4)
maskgit         accepts the codes of the likeliest draws, their number by a cosine
                (arXiv 2202.04200, section 3.2)
remdm           accepts at random, as many as the time says, and gives some accepted ones up
                again (arXiv 2503.00307, the capped schedule)
==============  ================================================================================

The last three come from masked diffusion. An *accepted* code is x1 and stays; the others are masked
or, where the path has no mask, drawn anew from p_t(. | x1) of the next time. The last step takes
every x1 that is not accepted yet. Without a mask the network cannot see which codes are accepted,
and such a canvas, part x1 and part noise, is cleaner than any of its time in training. Only
kinetic_euler keeps to canvases that training has shown on every path, hence the default.

How true a single code stays to what the network says of it, in total variation with an exact
network (tests/dida/test_samplers.py): with a mask, all are exact but maskgit, which prefers likely
codes everywhere; that is its point. kinetic_euler is also exact on mixture_uniform, and on the
metric path up to the size of its steps: 6% off at 8 of them, 3% at 25, 0.7% at 100. remdm is
exact without a mask for a network that is told what is accepted, and 8 to 10% off at 25 steps for
one that reads the noise off the canvas. entropy_bound prefers some codes there, because whether a
code looks certain depends on the noise it got (12% off at 25 steps on the metric path).

Everything here costs a few numbers a code, but for the path's own draws and jumps, which work in
chunks.
"""

import math
from dataclasses import dataclass

import torch

from emu35.config.dida import Sampler
from emu35.dida.path import Path
from emu35.parallel.noise import gumbel, seed_for, uniform

BOUND = 1.0
"""Nats that the joint entropy of the codes that entropy_bound accepts together may at most be above
that of their worst one."""

CHOICE_TEMPERATURE = 4.5
"""How much noise maskgit's choice starts with; that of the official code."""

REMASKED = 0.04
"""Share of the accepted codes that one step of remdm gives up at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Step ``number`` (from 0) of ``count``, from ``time`` to ``next``."""

    number: int
    count: int
    time: float
    next: float

    @property
    def last(self) -> bool:
        return self.number + 1 == self.count


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Of every code of one canvas: the x1 that was drawn, int64 [N], its log-probability, fp32 [N],
    and the entropy of the distribution in nats, fp32 [N], which only entropy_bound reads."""

    codes_N: torch.Tensor
    logprobs_N: torch.Tensor
    entropies_N: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Advanced:
    """The next canvas: states int64 [N], which of them are accepted, and which of those are the x1
    of this step, bool [N]."""

    states_N: torch.Tensor
    accepted_N: torch.Tensor
    taken_N: torch.Tensor


def begin(path: Path, *, seed: int, positions_N: torch.Tensor) -> torch.Tensor:
    """The states int64 [N] at time 0: the mask, or any code alike. ``positions_N`` (int64) number
    the codes among all that are drawn with ``seed``."""
    if path.mask is not None:
        return torch.full_like(positions_N, path.mask)
    noise_N = _uniform(seed_for("canvas", seed=seed), positions_N=positions_N)
    return (noise_N * path.codebook_size).long()


def draw_seed(seed: int, *, step: Step) -> int:
    """The seed of the draws of x1 in ``step``, apart from all others of ``seed``."""
    return seed_for(f"x1 of step {step.number}", seed=seed)


def entropy(scores_NK: torch.Tensor) -> torch.Tensor:
    """Entropy in nats, fp32 [N], of softmax(scores)."""
    logprobs_NK = scores_NK.log_softmax(-1)
    # 0 log 0 is 0: a score of -inf is a code that cannot be.
    return -(logprobs_NK.exp() * logprobs_NK.nan_to_num(neginf=0.0)).sum(-1)


def advance(
    sampler: Sampler,
    *,
    path: Path,
    states_N: torch.Tensor,
    accepted_N: torch.Tensor,
    prediction: Prediction,
    step: Step,
    seed: int,
    positions_N: torch.Tensor,
) -> Advanced:
    """One step of one canvas of N codes.

    Args:
        states_N: int64, codes or the path's mask, at ``step.time``.
        accepted_N: bool; none at the beginning.
        seed, positions_N: as for :func:`begin`. What is drawn depends on these, on the step and on
            this canvas alone.
    """
    codes_N = prediction.codes_N
    if step.last:
        return Advanced(
            states_N=torch.where(accepted_N, states_N, codes_N),
            accepted_N=torch.ones_like(accepted_N),
            taken_N=~accepted_N,
        )
    move = _Move(
        seed=seed_for(f"moves of step {step.number}", seed=seed),
        choice=seed_for(f"choice of step {step.number}", seed=seed),
        positions_N=positions_N,
        step=step,
    )
    if sampler is Sampler.kinetic_euler:
        moved_N = path.jump(
            states_N,
            codes_N=codes_N,
            times_N=move.full(step.time),
            next_N=move.full(step.next),
            seeds_N=move.seeds_N,
            positions_N=positions_N,
        )
        return Advanced(
            states_N=moved_N, accepted_N=accepted_N, taken_N=torch.zeros_like(accepted_N)
        )
    match sampler:
        case Sampler.entropy_bound:
            accepts_N = _of_least_entropy(prediction, accepted_N=accepted_N, step=step)
            kept_N = accepted_N
        case Sampler.maskgit:
            accepts_N = _of_likeliest(prediction, accepted_N=accepted_N, move=move)
            kept_N = accepted_N
        case Sampler.remdm:
            accepts_N, kept_N = _at_random(accepted_N, move=move)
    noise_N = move.noise(path, codes_N=codes_N, open_N=~(kept_N | accepts_N), states_N=states_N)
    return Advanced(
        states_N=torch.where(accepts_N, codes_N, noise_N),
        accepted_N=kept_N | accepts_N,
        taken_N=accepts_N,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Move:
    """What the draws of one step are made with."""

    seed: int
    choice: int
    positions_N: torch.Tensor
    step: Step

    @property
    def seeds_N(self) -> torch.Tensor:
        return torch.full_like(self.positions_N, self.seed)

    def full(self, time: float) -> torch.Tensor:
        return torch.full_like(self.positions_N, time, dtype=torch.float64)

    def noise(
        self, path: Path, *, codes_N: torch.Tensor, open_N: torch.Tensor, states_N: torch.Tensor
    ) -> torch.Tensor:
        """``states_N`` with noise of the next time in the open places."""
        if path.mask is not None:
            return states_N.masked_fill(open_N, path.mask)
        places_M = open_N.nonzero().squeeze(1)
        drawn_M = path.draw(
            codes_N[places_M],
            times_N=self.full(self.step.next)[places_M],
            seeds_N=self.seeds_N[places_M],
            positions_N=self.positions_N[places_M],
        )
        return states_N.index_copy(0, places_M, drawn_M)


def _of_least_entropy(
    prediction: Prediction, *, accepted_N: torch.Tensor, step: Step
) -> torch.Tensor:
    """The open codes of least entropy. Drawn independently they err by at most the sum of their
    entropies less the largest, so always by 0 for the first; beyond the bound, the share that the
    steps that are left must take is accepted all the same."""
    assert prediction.entropies_N is not None
    entropies_N = prediction.entropies_N.double().masked_fill(accepted_N, torch.inf)
    sorted_N, order_N = entropies_N.sort(stable=True)
    excess_N = sorted_N.cumsum(0) - sorted_N
    left = int((~accepted_N).sum())
    share = -(-left // (step.count - step.number))
    within = int((excess_N[:left] <= BOUND).sum())
    return _marked(order_N, count=max(within, share))


def _of_likeliest(prediction: Prediction, *, accepted_N: torch.Tensor, move: _Move) -> torch.Tensor:
    """The open codes whose draws are likeliest, with noise that fades, as many as the cosine asks
    for."""
    step = move.step
    done = (step.number + 1) / step.count
    noise_N = gumbel(
        torch.full_like(move.positions_N, move.choice),
        positions_N=move.positions_N,
        ids_NM=torch.zeros_like(move.positions_N)[:, None],
    )[:, 0]
    confidence_N = prediction.logprobs_N + CHOICE_TEMPERATURE * (1 - done) * noise_N
    left = int((~accepted_N).sum())
    stay = int(math.cos(math.pi / 2 * done) * len(accepted_N))
    order_N = confidence_N.masked_fill(accepted_N, -torch.inf).argsort(descending=True, stable=True)
    return _marked(order_N, count=min(left, max(1, left - stay)))


def _at_random(accepted_N: torch.Tensor, *, move: _Move) -> tuple[torch.Tensor, torch.Tensor]:
    """Newly accepted codes, and which of the accepted ones stay: with probabilities that make the
    expected share of accepted codes at any time the time itself (equation 7 of the paper)."""
    time, following = move.step.time, move.step.next
    given_up = min(REMASKED, (1 - following) / time) if time > 0 else 0.0
    accepted = (following - (1 - given_up) * time) / (1 - time)
    noise_N = _uniform(move.choice, positions_N=move.positions_N)
    return ~accepted_N & (noise_N < accepted), accepted_N & (noise_N >= given_up)


def _marked(order_N: torch.Tensor, *, count: int) -> torch.Tensor:
    """True in the first ``count`` places of ``order_N``."""
    marked_N = torch.zeros_like(order_N, dtype=torch.bool)
    marked_N[order_N[:count]] = True
    return marked_N


def _uniform(seed: int, *, positions_N: torch.Tensor) -> torch.Tensor:
    """Uniform noise fp64 [N]."""
    return uniform(
        torch.full_like(positions_N, seed),
        positions_N=positions_N,
        ids_NM=torch.zeros_like(positions_N)[:, None],
    )[:, 0]
