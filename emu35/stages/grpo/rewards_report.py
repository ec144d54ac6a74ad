"""What the rewards said in a step, as metrics over all replicas."""

from collections.abc import Mapping, Sequence

from emu35.config import PromptTaskConfig
from emu35.rewards.missing import Missing
from emu35.stages.grpo.replica import Replica
from emu35.stages.grpo.types import Group


def reward_metrics(
    groups: Sequence[Group], *, tasks: Mapping[str, PromptTaskConfig], replica: Replica
) -> dict[str, float]:
    """Means over answers. Collective.

    ``reward/TASK`` is the mean total of a task's answers and ``reward/TASK/NAME`` that of one of
    its rewards in [1, 10] (held-out ones too); ``lacking/TASK`` is the share of its answers that
    had fewer pictures than asked for and ``truncated/TASK`` of those whose text the length limit
    cut, ``clamped/TASK/NAME`` and ``unscored/TASK/NAME`` are shares as well. What did not occur is
    left out.
    """
    names = [
        (task, reward)
        for task, config in tasks.items()
        for reward in (None, *config.rewards, *config.held_out)
    ]
    numbers = replica.total(
        [number for task, reward in names for number in _sums(groups, task=task, reward=reward)]
    )
    metrics: dict[str, float] = {}
    for place, (task, reward) in enumerate(names):
        answers, found, total, clamped, incomplete = numbers[5 * place : 5 * place + 5]
        where = task if reward is None else f"{task}/{reward}"
        if found:
            metrics[f"reward/{where}"] = total / found
        if answers and reward is None:
            metrics[f"lacking/{where}"] = clamped / answers
            metrics[f"truncated/{where}"] = incomplete / answers
        if answers and reward is not None:
            metrics[f"clamped/{where}"] = clamped / answers
            metrics[f"unscored/{where}"] = incomplete / answers
    return metrics


def missing_scores(
    groups: Sequence[Group], *, tasks: Mapping[str, PromptTaskConfig], replica: Replica
) -> Missing:
    """What the trained rewards of ``tasks`` could not judge in ``groups``, over all replicas.
    Collective."""
    own = Missing()
    for group in groups:
        for scores in group.scores:
            own.add(scores, trained=tasks[group.prompt.task].rewards)
    every = Missing()
    for part in replica.gathered(own):
        every = every.plus(part)
    return every


def _sums(groups: Sequence[Group], *, task: str, reward: str | None) -> list[float]:
    """Answers, those with a score, its sum, those clamped (of a total: lacking), those unscored (of
    a total: truncated)."""
    own = [group for group in groups if group.prompt.task == task]
    scores = [one for group in own for one in group.scores]
    if reward is None:
        totals = [one.total for one in scores if one.total is not None]
        lacking = sum(one.lacking for one in scores)
        truncated = sum(rollout.truncated for group in own for rollout in group.rollouts)
        return [len(scores), len(totals), sum(totals), lacking, truncated]
    found = [one.mapped[reward] for one in scores if reward in one.mapped]
    return [
        len(scores),
        len(found),
        sum(found),
        sum(reward in one.clamped for one in scores),
        sum(reward in one.unscored for one in scores),
    ]
