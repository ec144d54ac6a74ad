"""The policy loss of sampled tokens, and what is reported about it.

Everything here is a pure function of one-dimensional tensors over the *sampled* tokens of a
micro-batch: what the grammar forced is not among them, so it is in no loss, KL or entropy.

    L = w * ( -c * A * clip(rho) + kl_weight * k3 - entropy_weight * H ),    rho = pi / pi_old

with the advantage A, the importance weight c of a rollout engine that is not quite the trainer, and
the weight w that makes a sum over micro-batches and ranks the mean that ``aggregation`` asks for.
Both log-probs of rho are under the behaviour policy (its support and temperature), those of the
KL over the full vocabulary. Sources: PPO clip (arXiv 1707.06347), dual clip (1912.09729), k3 and
GRPO (2402.03300), clip-higher and token mean (DAPO, 2503.14476), sums by a constant (Dr.GRPO,
2503.20783).

Suffixes: N sampled tokens, A answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from emu35.config.grpo import Aggregation, DriftConfig, Importance, PolicyLossConfig

LARGEST_LOG_RATIO = 20.0
"""log rho is clamped to +-20: far outside any clip range, and exp of it is finite, as is its
gradient (0 times infinity is no number even where a clipped ratio takes no part)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTotals:
    """What one update learns from, over all its micro-batches and ranks: ``tokens`` sampled, and
    ``answers`` that have any."""

    tokens: int = 0
    answers: int = 0

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "BatchTotals":
        """The totals of answers with that many sampled tokens each."""
        return cls(tokens=sum(lengths), answers=sum(length > 0 for length in lengths))

    def __add__(self, other: "BatchTotals") -> "BatchTotals":
        return BatchTotals(tokens=self.tokens + other.tokens, answers=self.answers + other.answers)


def aggregation_weights(
    lengths: Sequence[int], *, config: PolicyLossConfig, totals: BatchTotals, row_length: int
) -> list[float]:
    """What each sampled token of an answer weighs in the sum that is the loss of an update.

    Args:
        lengths: sampled tokens of each answer, all of them, however they are spread over rows.
        totals: of the whole update.
        row_length: divides sums of answers where ``norm_tokens`` is 0.

    Returns:
        a weight an answer, that of each of its tokens; 0 for an answer that sampled nothing.
    """
    assert totals.answers >= BatchTotals.of(lengths).answers, "totals span the whole update"
    if config.aggregation is Aggregation.token_mean:
        return [1 / totals.tokens if length else 0.0 for length in lengths]
    if config.aggregation is Aggregation.sequence_mean:
        return [1 / (totals.answers * length) if length else 0.0 for length in lengths]
    norm = config.norm_tokens or row_length
    return [1 / (totals.answers * norm) if length else 0.0 for length in lengths]


def answer_sums(values_N: torch.Tensor, *, answer_N: torch.Tensor, answers: int) -> torch.Tensor:
    """Sums over the tokens of each answer, fp64 [A]; ``answer_N`` int64 numbers the answers.

    Where the tokens of an answer lie on several ranks the sums are to be added up over them.
    """
    sums_A = torch.zeros(answers, dtype=torch.float64, device=values_N.device)
    return sums_A.index_add(0, answer_N, values_N.detach().double())


def importance_weights(
    difference_N: torch.Tensor,
    *,
    answer_N: torch.Tensor,
    sums_A: torch.Tensor,
    config: DriftConfig,
) -> torch.Tensor:
    """pi_trainer / pi_rollout of each token or of its whole answer, at most ``cap``.

    Args:
        difference_N: log pi_trainer - log pi_rollout, before the first update of a step.
        answer_N: int64, the answer that each token belongs to.
        sums_A: the differences summed by :func:`answer_sums`, over whole answers.

    Returns:
        constants [N] as ``difference_N``; ones without a correction.
    """
    if config.importance is Importance.none:
        return torch.ones_like(difference_N, requires_grad=False)
    if config.importance is Importance.token:
        log_weight_N = difference_N.detach()
    else:
        log_weight_N = sums_A[answer_N].to(difference_N.dtype)
    return log_weight_N.clamp(max=LARGEST_LOG_RATIO).exp().clamp(max=config.cap)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLosses:
    """The losses of sampled tokens, without their aggregation weights.

    Attributes:
        loss_N: the sum that is learned from; the only one with a gradient, as are its parts:
        surrogate_N: -c A clip(rho).
        kl_N: k3 to the reference; 0 without one.
        entropy_N: nats, of the behaviour policy.
        ratio_N: rho, a constant.
        log_ratio_N: log pi - log pi_old before any clamping, a constant.
        low_N, high_N, dual_N: bool, which clip (if any) holds the token, so that its surrogate
            has no gradient.
    """

    loss_N: torch.Tensor
    surrogate_N: torch.Tensor
    kl_N: torch.Tensor
    entropy_N: torch.Tensor
    ratio_N: torch.Tensor
    log_ratio_N: torch.Tensor
    low_N: torch.Tensor
    high_N: torch.Tensor
    dual_N: torch.Tensor

    def total(self, weight_N: torch.Tensor) -> torch.Tensor:
        """The scalar to differentiate: this micro-batch's part of the loss."""
        return (weight_N * self.loss_N).sum()


def token_losses(
    logprobs_N: torch.Tensor,
    *,
    old_N: torch.Tensor,
    plain_N: torch.Tensor,
    reference_N: torch.Tensor | None,
    advantage_N: torch.Tensor,
    correction_N: torch.Tensor,
    entropy_N: torch.Tensor,
    config: PolicyLossConfig,
) -> TokenLosses:
    """The clipped surrogate, the KL and the entropy bonus of every sampled token.

    Args:
        logprobs_N: log pi under the behaviour policy's support and temperature; differentiable.
        old_N: the same of the policy at the beginning of the step, a constant.
        plain_N: log pi over the full vocabulary at temperature 1; differentiable.
        reference_N: the same of the reference, a constant; None: no KL.
        advantage_N: of the token's answer.
        correction_N: importance weights, constants.
        entropy_N: of the behaviour policy; differentiable where the bonus has a weight.
    """
    surrogate_N, ratio_N, low_N, high_N, dual_N = _surrogate(
        logprobs_N - old_N.detach(),
        scaled_N=(correction_N * advantage_N).detach(),
        advantage_N=advantage_N.detach(),
        config=config,
    )
    kl_N = torch.zeros_like(plain_N) if reference_N is None else _k3(plain_N, reference_N, config)
    loss_N = surrogate_N
    if config.kl_weight and reference_N is not None:
        loss_N = loss_N + config.kl_weight * kl_N
    if config.entropy_weight:
        loss_N = loss_N - config.entropy_weight * entropy_N
    return TokenLosses(
        loss_N=loss_N,
        surrogate_N=surrogate_N,
        kl_N=kl_N,
        entropy_N=entropy_N,
        ratio_N=ratio_N,
        log_ratio_N=(logprobs_N - old_N).detach(),
        low_N=low_N,
        high_N=high_N,
        dual_N=dual_N,
    )


def _surrogate(
    log_ratio_N: torch.Tensor,
    *,
    scaled_N: torch.Tensor,
    advantage_N: torch.Tensor,
    config: PolicyLossConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-scaled * clip(rho), rho, and which clip holds.

    max(-rho A, -clip(rho) A), and for A < 0 min of that and -c A, written as the one ratio that
    counts: a maximum of two equal terms splits its gradient, and this says which clip it was.
    """
    ratio_N = log_ratio_N.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    lowest, highest = 1 - config.clip_low, 1 + config.clip_high
    low_N = (advantage_N < 0) & (ratio_N < lowest)
    high_N = (advantage_N > 0) & (ratio_N > highest)
    dual_N = torch.zeros_like(low_N)
    clipped_N = torch.where(low_N, lowest, torch.where(high_N, highest, ratio_N))
    if config.dual_clip:
        dual_N = (advantage_N < 0) & (ratio_N > config.dual_clip)
        clipped_N = torch.where(dual_N, config.dual_clip, clipped_N)
    return -scaled_N * clipped_N, ratio_N.detach(), low_N, high_N, dual_N


def _k3(plain_N: torch.Tensor, reference_N: torch.Tensor, config: PolicyLossConfig) -> torch.Tensor:
    """e^d - d - 1 with d = log pi_ref - log pi, clamped: never negative. For tokens drawn from pi
    itself its mean is KL(pi || ref), but for the clamp; its gradient's mean is that of KL(ref ||
    pi), as in GRPO."""
    d_N = (reference_N.detach() - plain_N).clamp(-config.kl_clamp, config.kl_clamp)
    return torch.expm1(d_N) - d_N


@dataclass(frozen=True, kw_only=True, slots=True)
class ModalitySums:
    """Sums over the sampled tokens of one modality. ``loss``, ``surrogate`` and ``kl`` are weighted
    as in the loss, so that they add up to it; what begins with ``sum_`` and what is clipped
    (``low``, ``high``, ``dual``) counts every token once."""

    loss: float = 0.0
    surrogate: float = 0.0
    kl: float = 0.0
    tokens: float = 0.0
    sum_surrogate: float = 0.0
    sum_kl: float = 0.0
    sum_entropy: float = 0.0
    sum_ratio: float = 0.0
    sum_old_kl: float = 0.0
    low: float = 0.0
    high: float = 0.0
    dual: float = 0.0

    def __add__(self, other: "ModalitySums") -> "ModalitySums":
        names = [each.name for each in fields(self)]
        return ModalitySums(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def with_mean_losses(self, updates: int) -> "ModalitySums":
        """Sums of so many updates, with the means of what is weighted as in the loss."""
        return replace(
            self,
            loss=self.loss / updates,
            surrogate=self.surrogate / updates,
            kl=self.kl / updates,
        )

    def metrics(self, suffix: str) -> dict[str, float]:
        """Means over tokens, their names with ``suffix``; empty without tokens."""
        if not self.tokens:
            return {}
        means = {
            "surrogate": self.sum_surrogate,
            "kl": self.sum_kl,
            "entropy": self.sum_entropy,
            "ratio": self.sum_ratio,
            "old_kl": self.sum_old_kl,
            "clip_low": self.low,
            "clip_high": self.high,
            "clip_dual": self.dual,
        }
        return {f"{name}{suffix}": total / self.tokens for name, total in means.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyReport:
    """What an update did to text (size digits included) and to visual tokens. ``largest_text`` and
    ``largest_visual`` are the largest rho of each, 0 without any."""

    text: ModalitySums
    visual: ModalitySums
    largest_text: float = 0.0
    largest_visual: float = 0.0

    @staticmethod
    def size() -> int:
        """Numbers in the vector of a report."""
        return 2 * len(fields(ModalitySums))

    @staticmethod
    def of(losses: TokenLosses, *, weight_N: torch.Tensor, visual_N: torch.Tensor) -> torch.Tensor:
        """The sums of one micro-batch as one fp64 vector: it adds up over micro-batches and ranks.

        Args:
            weight_N: aggregation weights.
            visual_N: bool, visual tokens; the others are text.
        """
        weight_N = weight_N.detach().double()
        log_ratio_N = losses.log_ratio_N.double()
        # k3 again: how far the policy has moved since the step began, in nats a token.
        moved_N = (-log_ratio_N).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        rows_FN = torch.stack(
            [
                weight_N * losses.loss_N.detach().double(),
                weight_N * losses.surrogate_N.detach().double(),
                weight_N * losses.kl_N.detach().double(),
                torch.ones_like(weight_N),
                losses.surrogate_N.detach().double(),
                losses.kl_N.detach().double(),
                losses.entropy_N.detach().double(),
                losses.ratio_N.double(),
                torch.expm1(moved_N) - moved_N,
                losses.low_N.double(),
                losses.high_N.double(),
                losses.dual_N.double(),
            ]
        )
        return torch.cat([rows_FN[:, ~visual_N].sum(1), rows_FN[:, visual_N].sum(1)])

    @classmethod
    def over(cls, reports: Sequence["PolicyReport"]) -> "PolicyReport":
        """Of several updates, those that were made if any were: the means of their losses, and of
        tokens those of all of them."""
        text, visual = reports[0].text, reports[0].visual
        for report in reports[1:]:
            text, visual = text + report.text, visual + report.visual
        return cls(
            text=text.with_mean_losses(len(reports)),
            visual=visual.with_mean_losses(len(reports)),
            largest_text=max(report.largest_text for report in reports),
            largest_visual=max(report.largest_visual for report in reports),
        )

    @classmethod
    def from_vector(
        cls, vector: torch.Tensor, *, largest: Sequence[float] = (0.0, 0.0)
    ) -> "PolicyReport":
        """The inverse of :meth:`of`; ``largest`` as :func:`largest_ratios` has it."""
        numbers = vector.tolist()
        names = [each.name for each in fields(ModalitySums)]
        half = len(names)
        return cls(
            text=ModalitySums(**dict(zip(names, numbers[:half], strict=True))),
            visual=ModalitySums(**dict(zip(names, numbers[half:], strict=True))),
            largest_text=largest[0],
            largest_visual=largest[1],
        )

    def metrics(self) -> dict[str, float]:
        """``loss`` and its parts ``loss_text`` and ``loss_visual``, which add up to it;
        ``kl``, ``entropy``, ``ratio``, ``old_kl`` (nats from the policy that sampled),
        ``surrogate`` and the shares ``clip_low``, ``clip_high``, ``clip_dual`` as means over
        sampled tokens, of all and of each modality that occurred (``kl_text``, ``kl_visual``);
        ``ratio_largest_text`` and ``ratio_largest_visual``; and how many tokens each has."""
        both = self.text + self.visual
        metrics = {"loss": both.loss, **both.metrics("")}
        for name, sums, largest in (
            ("text", self.text, self.largest_text),
            ("visual", self.visual, self.largest_visual),
        ):
            if sums.tokens:
                metrics |= {f"loss_{name}": sums.loss, f"sampled_{name}": sums.tokens}
                metrics[f"ratio_largest_{name}"] = largest
                metrics |= sums.metrics(f"_{name}")
        return metrics


def largest_ratios(losses: TokenLosses, *, visual_N: torch.Tensor) -> torch.Tensor:
    """The largest rho of text and of visual tokens, fp64 [2], 0 without any; over micro-batches and
    ranks the maximum counts, not the sum."""
    ratio_N = losses.ratio_N.double()
    none = ratio_N.new_zeros(1)
    return torch.stack(
        [torch.cat([none, ratio_N[chosen_N]]).max() for chosen_N in (~visual_N, visual_N)]
    )
