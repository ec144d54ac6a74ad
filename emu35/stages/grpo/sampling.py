"""Prompts to scored groups: the engine is kept full, and what ends is judged at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from emu35.config.prompts import PromptTaskConfig
from emu35.inference.request import Generated, Request
from emu35.rewards.sample import Sample
from emu35.stages.grpo.engine import RolloutEngine
from emu35.stages.grpo.rollouts import rollout_of
from emu35.stages.grpo.scoring import Pending, Scoring
from emu35.stages.grpo.types import Group, Prompt, Rollout

_POLL = 16
"""Turns of the engine between two looks at whether to stop: forwards, less than seconds together,
or half-second waits for servers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A prompt to be answered once for each of ``requests``; ``serial`` is its number among all
    prompts of the run."""

    prompt: Prompt
    serial: int
    task: PromptTaskConfig
    requests: Sequence[Request]


@dataclass(kw_only=True, slots=True, eq=False)
class Answered:
    """What became of a prompt: rollouts in order of its requests, and, where this rank judges, what
    is being judged."""

    asked: Asked
    rollouts: dict[int, Rollout] = field(default_factory=dict[int, Rollout])
    pending: dict[int, Pending] = field(default_factory=dict[int, Pending])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scored:
    """A group, and its answers as the rewards saw them (on the rank that judged them)."""

    group: Group
    samples: Sequence[Sample] = ()


def sample(
    asked: Sequence[Asked],
    *,
    engine: RolloutEngine,
    scoring: Scoring | None,
    step: int,
    beat: Callable[[], None],
    stop: Callable[[], bool] = lambda: False,
) -> list[Answered]:
    """Answer every prompt. Answers to one prompt stand next to each other in the engine, so that
    a group is complete early.

    Args:
        engine: prepared for all requests.
        scoring: judges what ends; None on ranks that do not judge.
        step: the weights are those before this step.
        beat: called again and again, as a sign of life.
        stop: asked now and then, the same on all ranks that share the engine; once it is true, what
            is unanswered remains so.
    """
    found = [Answered(asked=item) for item in asked]
    owners: dict[int, tuple[Answered, int]] = {}
    for answered in found:
        for number, request in enumerate(answered.asked.requests):
            owners[engine.submit(request)] = (answered, number)
    turns = 0
    while engine.busy:
        beat()
        turns += 1
        if turns % _POLL == 0 and stop():
            return found
        for answer in engine.step():
            answered, number = owners.pop(answer.index)
            _take(answered, number, answer, scoring=scoring, step=step)
    assert not owners, "the engine is idle, but not every request was answered"
    return found


def _take(
    answered: Answered, number: int, answer: Generated, *, scoring: Scoring | None, step: int
) -> None:
    asked = answered.asked
    answered.rollouts[number] = rollout_of(answer, request=asked.requests[number], step=step)
    if scoring is not None:
        answered.pending[number] = scoring.submit(asked.prompt, answer, task=asked.task)


def scored(
    answered: Sequence[Answered], *, scoring: Scoring, beat: Callable[[], None]
) -> list[Scored]:
    """Wait for the scores; on ranks that judge."""
    found: list[Scored] = []
    for item in answered:
        numbers = range(len(item.asked.requests))
        judged = [scoring.result(item.pending[number], beat=beat) for number in numbers]
        group = Group(
            serial=item.asked.serial,
            prompt=item.asked.prompt,
            rollouts=[item.rollouts[number] for number in numbers],
            scores=[one.scores for one in judged],
        )
        found.append(Scored(group=group, samples=[one.sample for one in judged]))
    return found
