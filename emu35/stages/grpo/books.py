"""What is kept of every step beside the weights: statistics, saved rollouts, pages to look at."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emu35.config import GRPOConfig, RunConfig
from emu35.parallel.collectives import is_main
from emu35.rewards.counts import PoolCounts
from emu35.rewards.statistics import TOTAL, RewardStatistics, StepSums
from emu35.stages.grpo.archive import ROLLOUTS, write_groups
from emu35.stages.grpo.diversity import DiversitySums
from emu35.stages.grpo.lesson import Compared
from emu35.stages.grpo.pages import SAMPLES, ShownAnswer, ShownGroup, write_pages
from emu35.stages.grpo.replica import Replica
from emu35.stages.grpo.sampling import Scored
from emu35.stages.grpo.scoring import Scoring
from emu35.tokens.serialize import deserialize
from emu35.tokens.text import TextTokenizer

_TIMES = ("scoring/hidden", "scoring/busy_s")


class Books:
    """Keeps them, on every rank alike.

    Args:
        run_dir: gets ``rollouts/`` and ``samples/``.
        scoring: of this rank; None where it does not judge.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        run_dir: Path,
        replica: Replica,
        tokenizer: TextTokenizer,
        scoring: Scoring | None,
    ) -> None:
        assert isinstance(config.stage, GRPOConfig)
        self._stage, self._name, self._run_dir = config.stage, config.name, run_dir
        self._replica, self._tokenizer, self._scoring = replica, tokenizer, scoring
        self._statistics = RewardStatistics(scoring.pool.ranges) if scoring is not None else None
        self._counted = PoolCounts()

    def enter(
        self, step: int, *, found: Sequence[Scored], groups: Sequence[Compared]
    ) -> dict[str, float]:
        """Take in a step's groups of this replica; figures of it over all replicas. Collective.

        Raises:
            DataError: rollouts or pages cannot be written.
        """
        if self._stage.saves_rollouts:
            self._archive(step, found)
        if self._page_due(step) and is_main():
            shown = self._shown(found, groups)
            write_pages(shown, folder=self._run_dir / SAMPLES, step=step, title=self._name)
        own: dict[str, float] = {}
        if self._scoring is not None:
            own = {**self._drifts(found, self._scoring), **self._events(self._scoring)}
        return {**self._diversity(found), **self._replica.agreed(own)}

    def troubles(self) -> dict[str, float]:
        """Everything that went wrong with rewards since this or :meth:`enter` was last called, for
        a validation: what it counted is not the next step's. Collective."""
        own: dict[str, float] = {}
        if self._scoring is not None:
            own = {
                name: value
                for name, value in self._events(self._scoring).items()
                if name not in _TIMES
            }
        return self._replica.agreed(own)

    def _archive(self, step: int, found: Sequence[Scored]) -> None:
        mesh = self._replica.mesh
        if (mesh.tp_rank, mesh.cp_rank, mesh.pp_rank) == (0, 0, 0):
            write_groups(
                [item.group for item in found],
                folder=self._run_dir / ROLLOUTS,
                step=step,
                rank=mesh.dp_rank,
                ranks=mesh.dp_size,
            )

    def _page_due(self, step: int) -> bool:
        every = self._stage.pages_every
        return every > 0 and (step % every == 0 or step in (1, self._stage.steps))

    def _shown(self, found: Sequence[Scored], groups: Sequence[Compared]) -> list[ShownGroup]:
        """Groups that this rank judged: it has their pictures."""
        shown: list[ShownGroup] = []
        for item, compared in zip(found, groups, strict=True):
            if not item.samples or len(shown) == self._stage.pages_groups:
                continue
            advantages = compared.advantages.values
            shown.append(
                ShownGroup(
                    group=item.group,
                    prompt=item.samples[0].prompt,
                    references=item.samples[0].references,
                    answers=[
                        ShownAnswer(
                            texts=sample.texts, pictures=sample.pictures, advantage=advantage
                        )
                        for sample, advantage in zip(item.samples, advantages, strict=True)
                    ],
                )
            )
        return shown

    def _diversity(self, found: Sequence[Scored]) -> dict[str, float]:
        sums = DiversitySums.of(
            [
                [
                    deserialize(rollout.ids.tolist(), self._tokenizer).images
                    for rollout in item.group.rollouts
                ]
                for item in found
            ]
        )
        return DiversitySums.from_numbers(self._replica.total(sums.numbers())).metrics()

    def _drifts(self, found: Sequence[Scored], scoring: Scoring) -> dict[str, float]:
        """How far each reward has moved since the run began."""
        assert self._statistics is not None
        ranges = scoring.pool.ranges
        step = StepSums(ranges)
        for item in found:
            for scores in item.group.scores:
                step.add(scores, task=item.group.prompt.task)
        every = self._replica.gathered(step.to_json())
        self._statistics.take([StepSums.from_json(plain, ranges=ranges) for plain in every])
        return {
            f"reward_drift/{task}" + ("" if name == TOTAL else f"/{name}"): summary.drift
            for (task, name), summary in self._statistics.summaries().items()
            if summary.drift is not None
        }

    def _events(self, scoring: Scoring) -> dict[str, float]:
        """``scoring/hidden``: the share of the time that rewards were at work which nobody waited
        for; and everything that went wrong, where anything did. Over all ranks that judge, which
        are several of a replica with context or pipeline parallelism."""
        now = scoring.pool.snapshot()
        counts, self._counted = now.since(self._counted), now
        names = sorted(counts.rewards)
        kinds = ("calls", "retries", "timeouts", "failures", "late")
        own = [counts.busy_seconds, counts.waited_seconds] + [
            float(getattr(counts.rewards[name], kind)) for name in names for kind in kinds
        ]
        busy, waited, *events = self._replica.everywhere(own)
        metrics: dict[str, float] = {}
        if busy > 0:
            metrics["scoring/hidden"] = min(max(1 - waited / busy, 0.0), 1.0)
            metrics["scoring/busy_s"] = busy
        for place, value in enumerate(events):
            name, kind = names[place // len(kinds)], kinds[place % len(kinds)]
            if value and kind != "calls":
                metrics[f"scoring/{name}/{kind}"] = value
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON has it."""
        return {"statistics": self._statistics.state_dict() if self._statistics else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            CheckpointError: a reward has another range now.
        """
        if self._statistics is not None and state["statistics"] is not None:
            self._statistics.load_state_dict(state["statistics"])
