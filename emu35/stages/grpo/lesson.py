"""Scored groups to what each update learns from.

A step's groups are cut into ``minibatches`` parts, in the order in which their prompts were drawn,
whichever replica sampled them; so the parts, and with the denominators summed over all replicas the
updates, are the same in every layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from emu35.config import GRPOConfig
from emu35.stages.grpo.advantage import GroupAdvantages, Teaching, group_advantages
from emu35.stages.grpo.objective import BatchTotals, aggregation_weights
from emu35.stages.grpo.replica import Replica
from emu35.stages.grpo.rows import Learned
from emu35.stages.grpo.types import Group


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Compared:
    """A group with the advantages of its answers."""

    group: Group
    advantages: GroupAdvantages

    @property
    def teaches(self) -> bool:
        """Whether any of its answers is trained on."""
        return any(value is not None for value in self.advantages.values)

    @property
    def compares(self) -> bool:
        """Whether some of its answers are better than others."""
        return self.advantages.teaching is Teaching.compared


def compared(groups: Sequence[Group], *, stage: GRPOConfig) -> list[Compared]:
    """Compare the answers of each group."""
    return [
        Compared(
            group=group,
            advantages=group_advantages(
                [scores.total for scores in group.scores], config=stage.advantage
            ),
        )
        for group in groups
    ]


def lesson(
    groups: Sequence[Compared], *, stage: GRPOConfig, row_length: int, replica: Replica
) -> list[list[Learned]]:
    """What this replica learns in each of the ``minibatches`` updates. Collective; a part may be
    empty here, and everywhere."""
    teaching = [item for item in groups if item.teaches]
    serials = [item.group.serial for item in teaching]
    order = sorted(serial for part in replica.gathered(serials) for serial in part)
    place = {serial: number for number, serial in enumerate(order)}
    parts: list[list[Compared]] = [[] for _ in range(stage.minibatches)]
    for item in teaching:
        parts[place[item.group.serial] * stage.minibatches // len(order)].append(item)
    return [_weighed(part, stage=stage, row_length=row_length, replica=replica) for part in parts]


def _weighed(
    part: Sequence[Compared], *, stage: GRPOConfig, row_length: int, replica: Replica
) -> list[Learned]:
    answers = [
        (rollout, value)
        for item in part
        for rollout, value in zip(item.group.rollouts, item.advantages.values, strict=True)
        if value is not None
    ]
    lengths = [int((~rollout.forced).sum()) for rollout, _ in answers]
    own = BatchTotals.of(lengths)
    tokens, count = replica.total([own.tokens, own.answers])
    weights = aggregation_weights(
        lengths,
        config=stage.loss,
        totals=BatchTotals(tokens=int(tokens), answers=int(count)),
        row_length=row_length,
    )
    return [
        Learned(rollout=rollout, advantage=value, weight=weight)
        for (rollout, value), weight in zip(answers, weights, strict=True)
        if weight > 0
    ]
