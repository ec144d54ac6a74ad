"""The policy loss against loops over single tokens in fp64, written as the papers write it."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu35.config.grpo import (
    AdvantageConfig,
    Aggregation,
    DriftConfig,
    Importance,
    PolicyLossConfig,
)
from emu35.stages.grpo.advantage import group_advantages
from emu35.stages.grpo.objective import (
    BatchTotals,
    PolicyReport,
    TokenLosses,
    aggregation_weights,
    answer_sums,
    importance_weights,
    largest_ratios,
    token_losses,
)

ROW = 64
SEEDS = st.integers(min_value=0, max_value=2**31)
LENGTHS = st.lists(st.integers(min_value=0, max_value=6), min_size=1, max_size=6).filter(any)
CONFIGS = st.builds(
    PolicyLossConfig,
    aggregation=st.sampled_from(Aggregation),
    clip_low=st.sampled_from([0.0, 0.1, 0.2]),
    clip_high=st.sampled_from([0.0, 0.2, 0.28]),
    dual_clip=st.sampled_from([0.0, 1.5, 3.0]),
    kl_weight=st.sampled_from([0.0, 1e-3, 0.5]),
    kl_clamp=st.sampled_from([0.5, 10.0]),
    entropy_weight=st.sampled_from([0.0, 0.01]),
    norm_tokens=st.sampled_from([0, 7]),
)


@dataclass(kw_only=True, slots=True)
class Tokens:
    """Sampled tokens of some answers; ``logprobs`` and ``plain`` and ``entropy`` are leaves."""

    lengths: list[int]
    answer_N: torch.Tensor
    logprobs_N: torch.Tensor
    plain_N: torch.Tensor
    entropy_N: torch.Tensor
    old_N: torch.Tensor
    reference_N: torch.Tensor
    advantage_N: torch.Tensor
    correction_N: torch.Tensor
    visual_N: torch.Tensor

    @classmethod
    def drawn(cls, *, lengths: list[int], seed: int, spread: float = 1.0) -> "Tokens":
        draw = torch.Generator().manual_seed(seed)
        total = sum(lengths)

        def normal(size: int = total) -> torch.Tensor:
            return torch.randn(size, generator=draw, dtype=torch.float64)

        answer_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        logprobs_N, plain_N = normal() - 3, normal() - 4
        return cls(
            lengths=lengths,
            answer_N=answer_N,
            logprobs_N=logprobs_N.requires_grad_(),
            plain_N=plain_N.requires_grad_(),
            entropy_N=normal().abs().requires_grad_(),
            old_N=logprobs_N.detach() + spread * normal(),
            reference_N=plain_N.detach() + spread * normal(),
            advantage_N=normal(len(lengths))[answer_N],
            correction_N=normal().abs(),
            visual_N=normal() > 0,
        )

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.logprobs_N, self.plain_N, self.entropy_N

    def losses(self, config: PolicyLossConfig, *, part: torch.Tensor | None = None) -> TokenLosses:
        at = torch.arange(len(self.answer_N)) if part is None else part
        return token_losses(
            self.logprobs_N[at],
            old_N=self.old_N[at],
            plain_N=self.plain_N[at],
            reference_N=self.reference_N[at],
            advantage_N=self.advantage_N[at],
            correction_N=self.correction_N[at],
            entropy_N=self.entropy_N[at],
            config=config,
        )

    def weight_N(self, config: PolicyLossConfig) -> torch.Tensor:
        weights = aggregation_weights(
            self.lengths, config=config, totals=BatchTotals.of(self.lengths), row_length=ROW
        )
        return torch.tensor(weights, dtype=torch.float64)[self.answer_N]


def _reference_loss(tokens: Tokens, config: PolicyLossConfig) -> torch.Tensor:
    """Answer by answer and token by token: min(rho A, clip(rho) A), from below by c A, then the
    KL, the entropy, and the mean that the paper of each mode defines."""
    answers: list[list[torch.Tensor]] = []
    place = 0
    for length in tokens.lengths:
        found = []
        for i in range(place, place + length):
            advantage = tokens.advantage_N[i]
            rho = torch.exp(tokens.logprobs_N[i] - tokens.old_N[i])
            clipped = torch.clamp(rho, 1 - config.clip_low, 1 + config.clip_high)
            objective = torch.minimum(rho * advantage, clipped * advantage)
            if config.dual_clip and advantage < 0:
                objective = torch.maximum(objective, config.dual_clip * advantage)
            d = torch.clamp(
                tokens.reference_N[i] - tokens.plain_N[i], -config.kl_clamp, config.kl_clamp
            )
            kl = torch.exp(d) - d - 1
            found.append(
                -tokens.correction_N[i] * objective
                + config.kl_weight * kl
                - config.entropy_weight * tokens.entropy_N[i]
            )
        answers.append(found)
        place += length
    taught = [torch.stack(found) for found in answers if found]
    if config.aggregation is Aggregation.token_mean:
        return torch.cat(taught).mean()
    if config.aggregation is Aggregation.sequence_mean:
        return torch.stack([each.mean() for each in taught]).mean()
    norm = config.norm_tokens or ROW
    return torch.stack([each.sum() / norm for each in taught]).mean()


def _gradients(loss: torch.Tensor, tokens: Tokens) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, tokens.leaves, allow_unused=True, retain_graph=True)
    return [
        torch.zeros_like(leaf) if g is None else g
        for leaf, g in zip(tokens.leaves, found, strict=True)
    ]


@settings(deadline=None, max_examples=150)
@given(lengths=LENGTHS, seed=SEEDS, config=CONFIGS)
def test_loss_and_gradient_are_those_of_the_loop(
    lengths: list[int], seed: int, config: PolicyLossConfig
) -> None:
    tokens = Tokens.drawn(lengths=lengths, seed=seed)
    loss = tokens.losses(config).total(tokens.weight_N(config))
    expected = _reference_loss(tokens, config)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for found, reference in zip(
        _gradients(loss, tokens), _gradients(expected, tokens), strict=True
    ):
        torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS, seed=SEEDS, config=CONFIGS, parts=st.integers(1, 4))
def test_micro_batches_do_not_matter(
    lengths: list[int], seed: int, config: PolicyLossConfig, parts: int
) -> None:
    """Loss, gradient and every figure of the report, however the tokens are dealt out: also where
    an answer's tokens lie on two ranks."""
    tokens = Tokens.drawn(lengths=lengths, seed=seed)
    weight_N = tokens.weight_N(config)
    whole = tokens.losses(config)
    dealt = torch.randint(parts, weight_N.shape, generator=torch.Generator().manual_seed(seed))
    total, report = torch.zeros(()), torch.zeros(PolicyReport.size(), dtype=torch.float64)
    largest = torch.zeros(2, dtype=torch.float64)
    for number in range(parts):
        part = (dealt == number).nonzero()[:, 0]
        losses = tokens.losses(config, part=part)
        visual_N = tokens.visual_N[part]
        total = total + losses.total(weight_N[part])
        report += PolicyReport.of(losses, weight_N=weight_N[part], visual_N=visual_N)
        largest = torch.maximum(largest, largest_ratios(losses, visual_N=visual_N))
    torch.testing.assert_close(total, whole.total(weight_N), rtol=1e-10, atol=1e-12)
    for found, expected in zip(
        _gradients(total, tokens), _gradients(whole.total(weight_N), tokens), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    expected = PolicyReport.of(whole, weight_N=weight_N, visual_N=tokens.visual_N)
    torch.testing.assert_close(report, expected, rtol=1e-9, atol=1e-9)
    assert largest.tolist() == largest_ratios(whole, visual_N=tokens.visual_N).tolist()
    metrics = PolicyReport.from_vector(report).metrics()
    assert metrics["loss"] == pytest.approx(float(total.detach()))
    assert metrics.get("loss_text", 0) + metrics.get("loss_visual", 0) == pytest.approx(
        metrics["loss"]
    )


@pytest.mark.parametrize("aggregation", Aggregation)
@pytest.mark.parametrize("divide", [True, False])
def test_first_on_policy_gradient_is_reinforce_with_the_group_baseline(
    aggregation: Aggregation, divide: bool
) -> None:
    """On a softmax policy with real samples: grad of -mean(A log pi), the advantages being rewards
    less the mean of their group."""
    draw = torch.Generator().manual_seed(5)
    logits_PV = torch.randn(3, 11, generator=draw, dtype=torch.float64).requires_grad_()
    lengths, answers, advantages = [], [], []
    for prompt in range(3):
        rewards = []
        for _ in range(4):
            length = int(torch.randint(1, 9, (), generator=draw))
            probs_V = logits_PV[prompt].detach().softmax(0)
            ids_T = torch.multinomial(probs_V, length, replacement=True, generator=draw)
            lengths.append(length)
            answers.append((prompt, ids_T))
            rewards.append(1 + 9 * float((ids_T % 2 == 0).double().mean()))
        group = group_advantages(rewards, config=AdvantageConfig(divide_by_std=divide))
        mean = sum(rewards) / 4
        scale = torch.tensor(rewards).std().item() + 1e-6 if divide else 1.0
        assert group.values == pytest.approx([(r - mean) / scale for r in rewards], rel=1e-5)
        advantages += list(group.values)
    logprobs = [logits_PV[prompt].log_softmax(0)[ids_T] for prompt, ids_T in answers]

    reinforce = torch.zeros((), dtype=torch.float64)
    for logprobs_T, advantage in zip(logprobs, advantages, strict=True):
        each = -advantage * logprobs_T
        if aggregation is Aggregation.token_mean:
            reinforce = reinforce + each.sum() / sum(lengths)
        elif aggregation is Aggregation.sequence_mean:
            reinforce = reinforce + each.mean() / len(lengths)
        else:
            reinforce = reinforce + each.sum() / ROW / len(lengths)

    config = PolicyLossConfig(aggregation=aggregation, kl_weight=0.0)
    logprobs_N = torch.cat(logprobs)
    ones_N = torch.ones_like(logprobs_N.detach())
    spread = torch.tensor(lengths)
    losses = token_losses(
        logprobs_N,
        old_N=logprobs_N.detach(),
        plain_N=logprobs_N,
        reference_N=None,
        advantage_N=torch.tensor(advantages, dtype=torch.float64).repeat_interleave(spread),
        correction_N=ones_N,
        entropy_N=ones_N,
        config=config,
    )
    weights = aggregation_weights(
        lengths, config=config, totals=BatchTotals.of(lengths), row_length=ROW
    )
    weight_N = torch.tensor(weights, dtype=torch.float64).repeat_interleave(spread)
    (found,) = torch.autograd.grad(losses.total(weight_N), logits_PV, retain_graph=True)
    (expected,) = torch.autograd.grad(reinforce, logits_PV)
    assert found.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert losses.ratio_N.tolist() == [1.0] * sum(lengths)
    assert not (losses.low_N | losses.high_N | losses.dual_N).any()


@pytest.mark.parametrize(
    ("advantage", "ratio", "clip", "counts"),
    [
        (2.0, 1.3, "none", 1.3),  # below 1 + clip_high
        (2.0, 1.5, "high", 1.4),
        (2.0, 0.1, "none", 0.1),  # a good answer may always become likelier
        (-2.0, 0.85, "none", 0.85),
        (-2.0, 0.5, "low", 0.8),
        (-2.0, 2.9, "none", 2.9),
        (-2.0, 50.0, "dual", 3.0),
        (0.0, 50.0, "none", 50.0),
    ],
)
def test_which_clip_holds(advantage: float, ratio: float, clip: str, counts: float) -> None:
    config = PolicyLossConfig(clip_low=0.2, clip_high=0.4, dual_clip=3.0)
    logprobs_N = torch.tensor([math.log(ratio)], dtype=torch.float64).requires_grad_()
    zeros_N, ones_N = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    losses = token_losses(
        logprobs_N,
        old_N=zeros_N,
        plain_N=zeros_N,
        reference_N=None,
        advantage_N=torch.tensor([advantage], dtype=torch.float64),
        correction_N=ones_N,
        entropy_N=zeros_N,
        config=config,
    )
    flags = {"low": losses.low_N, "high": losses.high_N, "dual": losses.dual_N}
    assert {name: bool(flag) for name, flag in flags.items()} == {
        name: name == clip for name in flags
    }
    assert float(losses.surrogate_N.detach()) == pytest.approx(-advantage * counts)
    if clip != "none":
        assert float(losses.ratio_N) == pytest.approx(ratio), "the report tells the true ratio"
        assert not torch.autograd.grad(losses.surrogate_N.sum(), logprobs_N)[0].any()


@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("jump", [200.0, -200.0])
def test_a_wild_ratio_leaves_loss_and_gradient_finite(
    dual_clip: float, advantage: float, jump: float
) -> None:
    logprobs_N = torch.tensor([jump, -1.0]).requires_grad_()
    plain_N = torch.tensor([jump, -1.0]).requires_grad_()
    zeros_N = torch.zeros(2)
    losses = token_losses(
        logprobs_N,
        old_N=zeros_N,
        plain_N=plain_N,
        reference_N=zeros_N,
        advantage_N=torch.full((2,), advantage),
        correction_N=torch.ones(2),
        entropy_N=zeros_N,
        config=PolicyLossConfig(dual_clip=dual_clip),
    )
    gradients = torch.autograd.grad(losses.total(torch.ones(2)), [logprobs_N, plain_N])
    assert torch.isfinite(losses.loss_N).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_kl_is_k3_and_pulls_to_the_reference() -> None:
    config = PolicyLossConfig(kl_weight=1.0, kl_clamp=2.0)
    plain_N = torch.tensor([-1.0, -3.0, -2.0, -9.0], dtype=torch.float64).requires_grad_()
    zeros_N = torch.zeros(4, dtype=torch.float64)
    losses = token_losses(
        zeros_N,
        old_N=zeros_N,
        plain_N=plain_N,
        reference_N=torch.tensor([-2.0, -2.0, -2.0, -2.0], dtype=torch.float64),
        advantage_N=zeros_N,
        correction_N=zeros_N,
        entropy_N=zeros_N,
        config=config,
    )
    expected = [math.exp(-1) + 1 - 1, math.e - 1 - 1, 0.0, math.exp(2) - 2 - 1]
    assert losses.kl_N.tolist() == pytest.approx(expected)
    gradient = torch.autograd.grad(losses.loss_N.sum(), plain_N)[0]
    assert gradient[0] > 0 > gradient[1], "too likely goes down, too unlikely up"
    assert gradient[2] == 0 == gradient[3], "no pull at the reference, nor beyond the clamp"


def test_aggregation_weights_sum_to_what_each_mode_means() -> None:
    lengths = [1, 0, 4000, 10]
    totals = BatchTotals.of(lengths)
    assert totals == BatchTotals(tokens=4011, answers=3)

    def answer_shares(aggregation: Aggregation, norm_tokens: int = 0) -> list[float]:
        config = PolicyLossConfig(aggregation=aggregation, norm_tokens=norm_tokens)
        weights = aggregation_weights(lengths, config=config, totals=totals, row_length=ROW)
        return [weight * length for weight, length in zip(weights, lengths, strict=True)]

    assert answer_shares(Aggregation.token_mean) == pytest.approx(
        [1 / 4011, 0, 4000 / 4011, 10 / 4011]
    )
    assert answer_shares(Aggregation.sequence_mean) == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert answer_shares(Aggregation.sequence_sum, 100) == pytest.approx(
        [1 / 300, 0, 4000 / 300, 10 / 300]
    )
    assert answer_shares(Aggregation.sequence_sum)[0] == pytest.approx(1 / (3 * ROW))


@given(LENGTHS, LENGTHS)
def test_totals_add_over_ranks(mine: list[int], others: list[int]) -> None:
    assert BatchTotals.of(mine) + BatchTotals.of(others) == BatchTotals.of(mine + others)


def test_nothing_sampled_weighs_nothing() -> None:
    for aggregation in Aggregation:
        config = PolicyLossConfig(aggregation=aggregation)
        assert aggregation_weights(
            [0, 0], config=config, totals=BatchTotals.of([0, 0]), row_length=ROW
        ) == [0.0, 0.0]


@settings(deadline=None)
@given(lengths=LENGTHS, seed=SEEDS, cap=st.sampled_from([0.5, 2.0, 100.0]))
def test_importance_weights(lengths: list[int], seed: int, cap: float) -> None:
    tokens = Tokens.drawn(lengths=lengths, seed=seed)
    difference_N = tokens.logprobs_N - tokens.old_N
    sums_A = answer_sums(difference_N, answer_N=tokens.answer_N, answers=len(lengths))

    def weights(importance: Importance) -> list[float]:
        found_N = importance_weights(
            difference_N,
            answer_N=tokens.answer_N,
            sums_A=sums_A,
            config=DriftConfig(importance=importance, cap=cap),
        )
        assert not found_N.requires_grad
        return found_N.tolist()

    differences = difference_N.tolist()
    whole = [
        sum(d for d, a in zip(differences, tokens.answer_N.tolist(), strict=True) if a == answer)
        for answer in tokens.answer_N.tolist()
    ]
    assert weights(Importance.none) == [1.0] * len(differences)
    assert weights(Importance.token) == pytest.approx([min(math.exp(d), cap) for d in differences])
    assert weights(Importance.sequence) == pytest.approx([min(math.exp(d), cap) for d in whole])


def test_importance_weights_scale_the_surrogate_only() -> None:
    tokens = Tokens.drawn(lengths=[3, 2], seed=1)
    config = PolicyLossConfig(kl_weight=0.5)
    plain = tokens.losses(config)
    tokens.correction_N = 2 * tokens.correction_N
    doubled = tokens.losses(config)
    torch.testing.assert_close(doubled.surrogate_N, 2 * plain.surrogate_N)
    torch.testing.assert_close(doubled.loss_N - plain.loss_N, plain.surrogate_N)


def test_report_tells_text_from_pictures() -> None:
    """4,000 visual tokens must not hide what happens to 2 of text."""
    visual_N = torch.ones(4002, dtype=torch.bool)
    visual_N[:2] = False
    logprobs_N = torch.zeros(4002, dtype=torch.float64)
    logprobs_N[:2] = math.log(2)
    zeros_N, ones_N = torch.zeros_like(logprobs_N), torch.ones_like(logprobs_N)
    losses = token_losses(
        logprobs_N,
        old_N=zeros_N,
        plain_N=zeros_N,
        reference_N=torch.where(visual_N, 0.0, -1.0).double(),
        advantage_N=ones_N,
        correction_N=ones_N,
        entropy_N=torch.where(visual_N, 3.0, 0.5).double(),
        config=PolicyLossConfig(aggregation=Aggregation.token_mean),
    )
    weight_N = ones_N / 4002
    vector = PolicyReport.of(losses, weight_N=weight_N, visual_N=visual_N)
    metrics = PolicyReport.from_vector(vector).metrics()
    assert metrics["clip_high_text"] == 1
    assert metrics["clip_high_visual"] == 0
    assert metrics["clip_high"] == pytest.approx(2 / 4002)
    assert metrics["ratio_text"] == pytest.approx(2)
    assert metrics["ratio_visual"] == 1
    assert metrics["entropy_text"] == 0.5
    assert metrics["entropy_visual"] == 3
    assert metrics["kl_text"] == pytest.approx(math.exp(-1))
    assert metrics["kl_visual"] == 0
    assert metrics["sampled_text"] == 2
    assert metrics["sampled_visual"] == 4000
    assert metrics["old_kl_text"] == pytest.approx(0.5 + math.log(2) - 1)
    assert metrics["loss"] == pytest.approx(float(losses.total(weight_N)))
    assert largest_ratios(losses, visual_N=visual_N).tolist() == pytest.approx([2, 1])


def test_report_of_no_tokens_is_silent_about_means() -> None:
    none_N = torch.zeros(0)
    losses = token_losses(
        none_N,
        old_N=none_N,
        plain_N=none_N,
        reference_N=None,
        advantage_N=none_N,
        correction_N=none_N,
        entropy_N=none_N,
        config=PolicyLossConfig(),
    )
    no_N = torch.zeros(0, dtype=torch.bool)
    vector = PolicyReport.of(losses, weight_N=none_N, visual_N=no_N)
    assert PolicyReport.from_vector(vector).metrics() == {"loss": 0.0}
    assert largest_ratios(losses, visual_N=no_N).tolist() == [0, 0]
