"""How much better an answer is than the other answers to its prompt (GRPO, arXiv 2402.03300).

A_i = (r_i - mean) / (std + epsilon) within a group, std unbiased; without the division A_i = r_i -
mean (Dr.GRPO, arXiv 2503.20783). The advantage of an answer holds for every token it sampled.

An answer without a score takes no part: it is in neither the mean nor the standard deviation, and
it is not trained on. A group with fewer than two scored answers has nothing to compare, so none of
its answers is.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from enum import StrEnum

from emu35.config.grpo import AdvantageConfig, ZeroVariance

EQUAL = 1e-6
"""Rewards lie in [1, 10]; those closer than this are equal. A score that comes out of a neural
network differs by rounding from batch to batch, and a standard deviation that small would blow the
rounding up to advantages of ordinary size."""


class Teaching(StrEnum):
    """What a group can teach: that some answers are better than others; nothing, as all are
    equally good; or nothing, as fewer than two have a score."""

    compared = "compared"
    zero_variance = "zero_variance"
    too_few = "too_few"


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupAdvantages:
    """The advantages of one group.

    Attributes:
        values: one an answer, in order; None for those that are not trained on.
        teaching: what the group can teach.
        scored: answers with a score.
        mean, std: of the scores; ``mean`` is NaN without any and ``std`` with fewer than two.
    """

    values: tuple[float | None, ...]
    teaching: Teaching
    scored: int
    mean: float
    std: float


def group_advantages(totals: Sequence[float | None], *, config: AdvantageConfig) -> GroupAdvantages:
    """Compare the answers of one group.

    Args:
        totals: the total score of each answer, None where it has none.

    Returns:
        the advantages. In a group without variance they are exactly 0 where ``zero_variance`` is
        ``keep`` and None otherwise: ``resample`` has dropped what it could not replace.

    Raises:
        ValueError: a total is not finite, which no reward may give.
    """
    for number, total in enumerate(totals):
        if total is not None and not math.isfinite(total):
            raise ValueError(
                f"the total score of answer {number} is {total}; scores are finite, and what could "
                "not be scored is None"
            )
    known = [total for total in totals if total is not None]
    mean = math.fsum(known) / len(known) if known else math.nan
    if len(known) < 2:
        return GroupAdvantages(
            values=(None,) * len(totals),
            teaching=Teaching.too_few,
            scored=len(known),
            mean=mean,
            std=math.nan,
        )
    std = math.sqrt(math.fsum((total - mean) ** 2 for total in known) / (len(known) - 1))
    if max(known) - min(known) <= EQUAL:
        teaching = Teaching.zero_variance
        equal = 0.0 if config.zero_variance is ZeroVariance.keep else None
        values = tuple(None if total is None else equal for total in totals)
    else:
        teaching = Teaching.compared
        scale = std + config.epsilon if config.divide_by_std else 1.0
        values = tuple(None if total is None else (total - mean) / scale for total in totals)
    return GroupAdvantages(values=values, teaching=teaching, scored=len(known), mean=mean, std=std)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSums:
    """What happened to the groups of a step, as sums that add up over ranks.

    ``reward`` sums the scores of answers, ``std`` the standard deviations of the ``compared`` and
    ``zero_variance`` groups, ``positive`` counts answers better than their group.
    """

    groups: float = 0.0
    compared: float = 0.0
    zero_variance: float = 0.0
    too_few: float = 0.0
    answers: float = 0.0
    scored: float = 0.0
    trained: float = 0.0
    positive: float = 0.0
    reward: float = 0.0
    std: float = 0.0

    @classmethod
    def of(cls, groups: Iterable[GroupAdvantages]) -> "GroupSums":
        found = list(groups)
        trained = [value for group in found for value in group.values if value is not None]
        return cls(
            groups=len(found),
            compared=sum(group.teaching is Teaching.compared for group in found),
            zero_variance=sum(group.teaching is Teaching.zero_variance for group in found),
            too_few=sum(group.teaching is Teaching.too_few for group in found),
            answers=sum(len(group.values) for group in found),
            scored=sum(group.scored for group in found),
            trained=len(trained),
            positive=sum(value > 0 for value in trained),
            reward=math.fsum(group.mean * group.scored for group in found if group.scored),
            std=math.fsum(group.std for group in found if group.scored > 1),
        )

    def numbers(self) -> list[float]:
        """The sums in field order, to be added up over ranks; ``GroupSums.from_numbers`` reads
        them."""
        return list(astuple(self))

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> "GroupSums":
        names = [each.name for each in fields(cls)]
        return cls(**dict(zip(names, numbers, strict=True)))

    def metrics(self) -> dict[str, float]:
        """``reward`` (mean over scored answers), ``reward_std`` (mean within groups), and shares:
        of groups without variance and with too few scores, of answers unscored, trained on, and
        better than their group. What nothing was seen of is left out."""
        metrics: dict[str, float] = {}
        if self.scored:
            metrics["reward"] = self.reward / self.scored
        measured = self.compared + self.zero_variance
        if measured:
            metrics["reward_std"] = self.std / measured
        if self.groups:
            metrics["groups_zero_variance"] = self.zero_variance / self.groups
            metrics["groups_too_few"] = self.too_few / self.groups
        if self.answers:
            metrics["answers_unscored"] = 1 - self.scored / self.answers
            metrics["answers_trained"] = self.trained / self.answers
        if self.trained:
            metrics["answers_positive"] = self.positive / self.trained
        return metrics
