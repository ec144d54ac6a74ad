"""One step of reinforcement learning: sample -> score -> compare -> update."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from emu35.checkpoint import sharded
from emu35.checkpoint.staged import StateWrite
from emu35.config import GRPOConfig, LMConfig, PromptDataConfig, PromptTaskConfig, RunConfig
from emu35.config.grpo import Alarm, Mode, Unscored, ZeroVariance
from emu35.config.stage import adapters_of
from emu35.data.loader import LOADER_FILE
from emu35.errors import CheckpointError, ReleaseError
from emu35.model.flops import step_flops
from emu35.model.shapes import adapter_count
from emu35.parallel.collectives import barrier, is_main
from emu35.stages.grpo.advantage import GroupSums
from emu35.stages.grpo.archive import read_groups
from emu35.stages.grpo.books import Books
from emu35.stages.grpo.lesson import Compared, compared, lesson
from emu35.stages.grpo.objective import PolicyReport
from emu35.stages.grpo.replica import Replica
from emu35.stages.grpo.rewards_report import missing_scores, reward_metrics
from emu35.stages.grpo.rows import lay_out
from emu35.stages.grpo.sampler import Sampler
from emu35.stages.grpo.sampling import Scored
from emu35.stages.grpo.source import PromptSource
from emu35.stages.grpo.stopping import EarlyStop
from emu35.stages.grpo.types import Group
from emu35.stages.grpo.updates import Drift, PolicyUpdates
from emu35.stages.language_model import start_from
from emu35.train.clock import Phase, StepClock
from emu35.train.guard import Guard
from emu35.train.measure import FLOPS
from emu35.train.objective import MicroBatch
from emu35.train.optim import learning_rate
from emu35.train.signals import StepAbandoned


class GRPOTask:
    """What happens at every step; the trainer drives it.

    Args:
        source: prompts, in the order of the plan.
        sampler: has them answered and judged.
        updates: the model, its optimizer and the passes of a step.
        books: what is kept of every step.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        source: PromptSource,
        sampler: Sampler,
        updates: PolicyUpdates,
        books: Books,
        guard: Guard,
        clock: StepClock,
    ) -> None:
        assert isinstance(config.stage, GRPOConfig)
        assert isinstance(config.data, PromptDataConfig)
        self.config, self.data = config, config.data
        self.stage: GRPOConfig = config.stage
        self.source, self.sampler, self.updates = source, sampler, updates
        self.books, self.guard, self.clock = books, guard, clock
        self.stopping = EarlyStop(self.stage.evaluation, sets=self.data.validation)
        self.replica = Replica(mesh=updates.mesh)
        self._started_from: int | None = None

    def train_step(self, step: int) -> dict[str, float]:
        """Answer prompts, judge and compare the answers, and update ``epochs`` x ``minibatches``
        times.

        Raises:
            StepAbandoned: on every rank, after a stop was asked for while answers were sampled.
            DataError: too many answers have no score.
        """
        groups, metrics = self._compared_groups(step)
        parts = self._parts(groups)
        learned = [micro_batch for part in parts for micro_batch in part]
        rate = learning_rate(self.config.optim, step=step, steps=self.stage.steps)
        metrics |= {"lr": rate}
        self.guard.conclude([])
        if not learned or self.stage.mode is Mode.rollouts_only:
            return {**metrics, "loss": 0.0, "updates": 0.0, "tokens": 0.0}
        with self.clock.marked(Phase.replay):
            drift = self.updates.replay(learned)
            self.updates.ask_reference(learned)
        metrics |= {"drift/mean": drift.mean, "drift/largest": drift.largest}
        if self._drifted_too_far(drift):
            return {**metrics, "loss": math.nan, "updates": 0.0, "tokens": 0.0}
        return {**metrics, **self._sizes(learned), **self._update(parts, rate=rate)}

    def _update(self, parts: Sequence[list[MicroBatch]], *, rate: float) -> dict[str, float]:
        """Every update of the step: means over all of them, the largest gradient norm, and how many
        were made and refused. Where all were refused, the trainer says so."""
        updates = [
            self.updates.update(part, rate=rate) for _ in range(self.stage.epochs) for part in parts
        ]
        self.guard.conclude([update.refused for update in updates])
        refused = [update.refused for update in updates if update.refused]
        if refused and self.guard.reason is None and is_main():
            told = "; ".join(dict.fromkeys(refused))
            print(f"{len(refused)} of {len(updates)} updates were refused: {told}", flush=True)
        made = [update for update in updates if update.refused is None]
        norms = [update.grad_norm for update in updates]
        return {
            **PolicyReport.over([update.report for update in made or updates]).metrics(),
            "grad_norm": max(norm if math.isfinite(norm) else math.inf for norm in norms),
            "updates": float(len(made)),
            "updates_refused": float(len(refused)),
        }

    def _compared_groups(self, step: int) -> tuple[list[Compared], dict[str, float]]:
        """The groups of this replica, and what the rewards said over all replicas."""
        found = self._saved(step) if self.stage.mode is Mode.train_only else self._sampled(step)
        groups = compared([item.group for item in found], stage=self.stage)
        sums = self.replica.total(GroupSums.of(group.advantages for group in groups).numbers())
        metrics = GroupSums.from_numbers(sums).metrics()
        metrics |= reward_metrics(
            [item.group for item in found], tasks=self.data.tasks, replica=self.replica
        )
        metrics |= self.sampler.events()
        return groups, {**metrics, **self.books.enter(step, found=found, groups=groups)}

    def _saved(self, step: int) -> list[Scored]:
        """This replica's share of the groups that an earlier run saved for ``step``."""
        assert self.stage.rollout.replay is not None
        with self.clock.marked(Phase.data):
            groups = read_groups(Path(self.stage.rollout.replay), step=step)
            groups.sort(key=lambda group: group.serial)
        return [Scored(group=group) for group in self.replica.share(groups)]

    def _sampled(self, step: int) -> list[Scored]:
        """Answers to the next prompts, judged. With ``zero_variance: resample`` groups that compare
        nothing make room for other prompts. A step that is given up takes no prompt."""
        place = self.source.state_dict()
        try:
            seen = self._rounds(step)
        except StepAbandoned:
            self.source.load_state_dict(place)
            raise
        missing = missing_scores(
            [item.group for item in seen], tasks=self.data.tasks, replica=self.replica
        )
        missing.check(policy=self.stage.unscored, most=self.stage.max_unscored)
        return seen

    def _rounds(self, step: int) -> list[Scored]:
        advantage, wanted = self.stage.advantage, self.stage.prompts_per_step
        seen: list[Scored] = []
        missing, rounds = wanted, 1
        if advantage.zero_variance is ZeroVariance.resample:
            rounds += advantage.resample_rounds
        while missing > 0 and rounds > 0:
            seen += self.sampler.groups(self.source.take(missing), step=step)
            rounds -= 1
            groups = compared([item.group for item in seen], stage=self.stage)
            (useful,) = self.replica.total([sum(group.compares for group in groups)])
            missing = wanted - int(useful)
        return seen

    def _parts(self, groups: Sequence[Compared]) -> list[list[MicroBatch]]:
        """What this rank computes in each update of an epoch; parts that are empty on all replicas
        are left out."""
        parts: list[list[MicroBatch]] = []
        for learned in lesson(
            groups,
            stage=self.stage,
            row_length=self.data.sequence_length,
            replica=self.replica,
        ):
            (anywhere,) = self.replica.total([len(learned)])
            if not anywhere:
                continue
            batches = lay_out(
                learned,
                tokenizer=self.source.tokenizer,
                sequence_length=self.data.sequence_length,
                micro_batch_size=self.stage.micro_batch_size,
                multiple=self.updates.passes.group_size,
            )
            parts.append(self.updates.micro_batches(batches))
        return parts

    def _drifted_too_far(self, drift: Drift) -> bool:
        """Whether this step must change nothing; a drift that may pass is told."""
        limits = self.stage.drift
        if drift.mean <= limits.mean and drift.largest <= limits.largest:
            return False
        text = (
            f"the trainer's log-probabilities are {drift.mean:.3g} nats from the rollout engine's "
            f"on average and {drift.largest:.3g} at most (stage.drift.mean={limits.mean}, "
            f"stage.drift.largest={limits.largest})"
        )
        if limits.alarm is Alarm.skip:
            self.guard.refuse(text)
            return True
        if is_main():
            print(f"{text}; stage.drift.importance=token corrects for it", flush=True)
        return False

    def _sizes(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Tokens of the rows of all replicas, and the model FLOPs of the updates that are computed
        from them; sampling and the passes that only look are not counted."""
        assert isinstance(self.config.model, LMConfig)
        own = [
            sum(item.tokens for item in micro_batches),
            sum(item.visible_pairs for item in micro_batches),
        ]
        tokens, pairs = self.replica.total(own)
        lora = adapters_of(self.stage)
        flops = step_flops(
            self.config.model,
            vocabulary_size=self.source.tokenizer.vocabulary.size,
            tokens=int(tokens),
            visible_pairs=int(pairs),
            adapters=adapter_count(self.config.model, lora=lora) if lora else None,
        )
        return {"tokens": tokens, FLOPS: flops * self.stage.epochs}

    def validate(self, step: int) -> dict[str, float]:
        """Mean rewards of answers to held-out prompts, by set: ``SET/reward`` of the trained ones
        together and ``SET/NAME`` of each reward, in [1, 10]; ``SET/NAME/unscored`` is the share of
        answers that it could not judge. Beside them what went wrong with rewards and
        engine.

        Raises:
            StepAbandoned: on every rank, after a stop was asked for.
            DataError: a trained reward of a set failed, and ``stage.unscored`` is ``stop``.
        """
        metrics: dict[str, float] = {}
        for name, due in self.source.validation.items():
            tasks = {name: self.data.validation[name]}
            groups = [item.group for item in self.sampler.groups(due, step=step)]
            self._check_validated(groups, tasks=tasks)
            found = reward_metrics(groups, tasks=tasks, replica=self.replica)
            for key, value in found.items():
                kind, _, where = key.partition("/")
                reward = where.removeprefix(name).removeprefix("/")
                if kind == "reward":
                    metrics[f"{name}/{reward or kind}"] = value
                elif kind == "unscored":
                    metrics[f"{name}/{reward}/unscored"] = value
        self.stopping.observe(step, metrics)
        return {**metrics, **self.sampler.events(), **self.books.troubles()}

    def _check_validated(
        self, groups: Sequence[Group], *, tasks: Mapping[str, PromptTaskConfig]
    ) -> None:
        """Nothing is trained on a validation, so answers without a score do not end the run, unless
        none may be without."""
        missing = missing_scores(groups, tasks=tasks, replica=self.replica)
        if self.stage.unscored is Unscored.stop:
            missing.check(policy=self.stage.unscored, most=self.stage.max_unscored)
        elif missing.share > self.stage.max_unscored and is_main():
            print(f"validation {', '.join(tasks)}: {missing}", flush=True)

    @property
    def finished(self) -> str | None:
        """Why the run ends before its last step; None while it goes on."""
        return self.stopping.finished

    def start(self) -> None:
        """The weights that ``stage.init_from`` names, which are the reference as well."""
        self._started_from = start_from(self.updates.chunks, config=self.config)
        # The optimizer made its fp32 copies when it was built.
        self.updates.optimizer.reload_model_params()
        self.updates.version += 1
        self._keep_reference()

    def _read_reference(self) -> None:
        step, name = self._started_from, self.config.stage.init_from
        try:
            start_from(self.updates.chunks, config=self.config, step=step)
        except (CheckpointError, ReleaseError) as error:
            raise CheckpointError(
                f"the reference of this run is what stage.init_from={name} had when it began (step "
                f"{step}), and cannot be read again: {error}; put it back, or begin another run_dir"
            ) from error
        self._keep_reference()

    def _keep_reference(self) -> None:
        if self.stage.keeps_reference:
            self.updates.reference.take()

    def save(self, folder: Path) -> StateWrite:
        """Place among the prompts, and a plan for model and optimizer; every rank calls it. The
        reference is not saved: it is what ``stage.init_from`` had when the run began, and the step
        of that is."""
        self.updates.passes.gather_parameters()
        state = sharded.plan_save(
            folder, chunks=self.updates.chunks, optimizer=self.updates.optimizer
        )
        if is_main():
            state_of = {
                "prompts": self.source.state_dict(),
                "books": self.books.state_dict(),
                "stopping": self.stopping.state_dict(),
                "started_from": self._started_from,
            }
            place = json.dumps(state_of, indent=1)
            (folder / LOADER_FILE).write_text(place, encoding="utf-8")
        return state

    def load(self, folder: Path) -> None:
        """Undo ``save``, in this or another layout.

        Raises:
            CheckpointError: the run that the reference is from has that checkpoint no more.
        """
        place = json.loads((folder / LOADER_FILE).read_text(encoding="utf-8"))
        # A run of before this was kept began with what was the newest then.
        self._started_from = place.get("started_from")
        if self.stage.keeps_reference:
            # It may have newer checkpoints by now, and the reference must stay what it was.
            self._read_reference()
        sharded.load(folder, chunks=self.updates.chunks, optimizer=self.updates.optimizer)
        self.updates.version += 1
        self.source.load_state_dict(place["prompts"])
        self.books.load_state_dict(place["books"])
        self.stopping.load_state_dict(place["stopping"])
        barrier()
