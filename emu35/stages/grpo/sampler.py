"""The engine and the rewards of a run, as one thing to ask for scored groups."""

from collections.abc import Sequence

from emu35.config import GRPOConfig, PromptDataConfig, RunConfig
from emu35.rewards.missing import Missing
from emu35.stages.grpo.engine import RolloutEngine
from emu35.stages.grpo.replica import Replica
from emu35.stages.grpo.sampling import Answered, Asked, Scored, sample, scored
from emu35.stages.grpo.scoring import Scoring
from emu35.stages.grpo.types import Group, Scores
from emu35.train.clock import Phase, StepClock
from emu35.vision.codec import ImageCodec


class Sampler:
    """Prompts in, scored groups out, on every rank those of its replica.

    Args:
        engine: samples; all ranks of a tensor-parallel group call theirs alike.
        codec: decodes for the rewards on ranks that judge.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        engine: RolloutEngine,
        codec: ImageCodec,
        replica: Replica,
        clock: StepClock,
    ) -> None:
        assert isinstance(config.stage, GRPOConfig)
        assert isinstance(config.data, PromptDataConfig)
        self._stage, self.replica, self._clock = config.stage, replica, clock
        # A validation set may share its name with a task; then their rewards are told together.
        tasks = [*config.data.tasks.items(), *config.data.validation.items()]
        self._trained: dict[str, set[str]] = {}
        for name, task in tasks:
            self._trained.setdefault(name, set()).update(task.rewards)
        self.engine = engine
        self.scoring = Scoring(codec=codec, rewards=config.stage.rewards) if replica.leads else None

    def groups(self, asked: Sequence[Asked], *, step: int) -> list[Scored]:
        """Answer and judge ``asked``, the same on every rank; what comes back is the share of this
        replica, in order. Collective.

        Raises:
            DataError: too many answers could not be scored, or ``stage.unscored`` is ``stop``.
        """
        own = self.replica.part(self.replica.share(asked))
        with self._clock.marked(Phase.sampling):
            requests = [request for item in own for request in item.requests]
            self.engine.prepare(requests)
            answered = sample(
                own,
                engine=self.engine,
                scoring=self.scoring,
                step=step,
                beat=self._clock.beat,
            )
            self.engine.release()
        with self._clock.marked(Phase.scoring):
            found = self._judged(answered)
        self._require_scores([item.group for item in found])
        return found

    def _judged(self, answered: Sequence[Answered]) -> list[Scored]:
        """Scores of this rank's groups from whoever judges them, and the groups of the others of
        the replica. Pictures stay where they were judged."""
        own: list[Scored] = []
        if self.scoring is not None:
            own = scored(answered, scoring=self.scoring, beat=self._clock.beat)
        scores: list[list[Scores]] = self.replica.agreed([list(item.group.scores) for item in own])
        groups = [
            Group(
                serial=item.asked.serial,
                prompt=item.asked.prompt,
                rollouts=[item.rollouts[number] for number in range(len(item.asked.requests))],
                scores=of_group,
            )
            for item, of_group in zip(answered, scores, strict=True)
        ]
        pictures = {item.group.serial: item.samples for item in own}
        return [
            Scored(group=group, samples=pictures.get(group.serial, ()))
            for group in self.replica.joined(groups)
        ]

    def _require_scores(self, groups: Sequence[Group]) -> None:
        """Stop where the configuration says that so many answers without a score are too many."""
        missing = Missing()
        for group in groups:
            for scores in group.scores:
                missing.add(scores, trained=self._trained[group.prompt.task])
        every = Missing()
        for part in self.replica.gathered(missing):
            every = every.plus(part)
        every.check(policy=self._stage.unscored, most=self._stage.max_unscored)

    def close(self) -> None:
        """End the engine, and the threads of the rewards."""
        self.engine.close()
        if self.scoring is not None:
            self.scoring.close()
