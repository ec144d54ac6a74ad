"""The engine and the rewards of a run, as one thing to ask for scored groups."""

from collections.abc import Sequence

from emu35.checkpoint.agree import gather
from emu35.config import GRPOConfig
from emu35.errors import DataError
from emu35.parallel.collectives import any_rank
from emu35.stages.grpo.engine import RolloutEngine
from emu35.stages.grpo.replica import Replica
from emu35.stages.grpo.sampling import Answered, Asked, Scored, sample, scored
from emu35.stages.grpo.scoring import Scoring
from emu35.stages.grpo.source import Codes, Due, PromptSource
from emu35.stages.grpo.types import Group, Scores
from emu35.train.clock import Phase, StepClock
from emu35.train.signals import StepAbandoned, stop_asked


class Sampler:
    """Prompts in, scored groups out, on every rank those of its replica.

    Args:
        source: encodes what prompts show; its codec decodes for the rewards on ranks that judge.
        engine: samples; all ranks of a tensor-parallel group call theirs alike.
    """

    def __init__(
        self,
        *,
        stage: GRPOConfig,
        source: PromptSource,
        engine: RolloutEngine,
        replica: Replica,
        clock: StepClock,
    ) -> None:
        self._source, self.replica, self._clock = source, replica, clock
        self.engine = engine
        self._told: dict[str, float] = {}
        self.scoring = None
        if replica.leads:
            self.scoring = Scoring(codec=source.codec, rewards=stage.rewards)

    def groups(self, due: Sequence[Due], *, step: int) -> list[Scored]:
        """Have ``due``, the same on every rank, answered and judged; what comes back is the share
        of this replica, in order. Collective.

        Raises:
            StepAbandoned: on every rank, where one was asked to stop before all had sampled.
            DataError: a picture that a prompt shows can no longer be read.
        """
        with self._clock.marked(Phase.data):
            own = self._asked(self.replica.part(self.replica.share(due)))
        with self._clock.marked(Phase.sampling):
            requests = [request for item in own for request in item.requests]
            self.engine.prepare(requests)
            answered = sample(
                own,
                engine=self.engine,
                scoring=self.scoring,
                step=step,
                beat=self._clock.beat,
                stop=lambda: self.replica.agreed(stop_asked()),
            )
            self.engine.release()
            # What was sampled so far is lost, and drawn alike by the run that goes on.
            if any_rank(stop_asked()):
                raise StepAbandoned
        with self._clock.marked(Phase.scoring):
            return self._judged(answered)

    def _asked(self, due: Sequence[Due]) -> list[Asked]:
        """The requests of what this rank samples. One rank of a tensor-parallel group encodes for
        all of them: two devices need not agree on every code."""
        codes: list[Codes] = []
        failed: DataError | None = None
        if self.replica.leads:
            try:
                for item in due:
                    codes.append(self._source.codes(item))
                    self._clock.beat()
            except DataError as error:
                failed = error
        codes = self.replica.agreed(codes)
        # Everybody ends, or those who could read would wait for the others in sampling.
        for error in filter(None, gather(failed)):
            raise error
        return [self._source.asked(item, codes=of) for item, of in zip(due, codes, strict=True)]

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

    def events(self) -> dict[str, float]:
        """What the engine counted since this was last asked, over all ranks, as far as anything
        happened. Collective."""
        now = self.engine.tallies()
        if not now:
            return {}
        own = [value - self._told.get(name, 0.0) for name, value in now.items()]
        self._told = now
        sums = self.replica.agreed(self.replica.everywhere(own))
        return {name: value for name, value in zip(now, sums, strict=True) if value}

    def close(self) -> None:
        """End the engine, and the threads of the rewards."""
        self.engine.close()
        if self.scoring is not None:
            self.scoring.close()
