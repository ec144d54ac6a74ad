"""The training loop, the same for every trained stage.

A stage hands in a :class:`TrainTask`, which knows how to make one optimizer step, to validate, and
to write and read its own state. The loop decides when each of these happens and what else belongs
to it: metrics, checkpoints, resuming, leaving when asked. It reads from top to bottom; nothing
registers for anything.

Steps count from 1: ``train_step(step)`` makes step number ``step``, and a checkpoint of step N
holds the state after N optimizer steps.

**Exactness.** N + M steps equal N steps, a stop, M steps, bit for bit in parameters and metrics
(where the arithmetic itself is deterministic). For that a checkpoint holds everything a step
depends on: the task's state (parameters, optimizer, data position) and every random number
generator of every rank; and nothing beside a step may touch those generators, so validation and
saving run with them set aside. A stop skips a validation that is due and the resumed run makes it
first, because validation may take longer than the time a scheduler leaves; so may a step of a task
that gives it up then, and the resumed run makes it again.

**Safety.** A step whose loss or gradient norm is not finite, or is a spike where ``guard`` asks for
that, counts as made but updates nothing (:mod:`emu35.train.guard`); too many in a row end the run.
Ranks that wait for one which hangs, was stopped or died are ended with its name
(:mod:`emu35.train.watchdog`). So no checkpoint ever holds parameters that a bad step has touched.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from emu35.checkpoint.manager import Checkpoint, CheckpointManager
from emu35.checkpoint.staged import StagedWrite
from emu35.checkpoint.steps import CHECKPOINTS
from emu35.config import RunConfig
from emu35.config.io import run_identity
from emu35.errors import CheckpointError, Emu35Error, Interrupted
from emu35.log.metrics import Logger, is_row, make_logger
from emu35.parallel.collectives import barrier, is_main, rank
from emu35.train import rng
from emu35.train.clock import Phase, StepClock
from emu35.train.guard import Guard
from emu35.train.measure import Meter
from emu35.train.progress import Progress
from emu35.train.signals import StepAbandoned, StopRequest
from emu35.train.watchdog import Watchdog


class TrainTask(Protocol):
    """What a stage trains. Every method is called on every rank, in the same order.

    Attributes:
        guard: asked by every step whether it may update; the trainer keeps its state.
        clock: on which a step marks its phases; the trainer reads it.
    """

    guard: Guard
    clock: StepClock

    @property
    def finished(self) -> str | None:
        """Why training is to end before ``stage.steps``, in words; None: it goes on. Equal on every
        rank, asked between steps, and restored by :meth:`load`."""
        ...

    def train_step(self, step: int) -> Mapping[str, float]:
        """Make optimizer step ``step`` (from 1) and return its metrics, equal on every rank.

        ``loss`` must be among them; ``grad_norm``, ``lr`` and ``tokens`` (those of the step over
        all ranks) should be, and ``flops`` (model FLOPs, likewise) may be. Where the guard
        refuses, parameters and optimizer stay as they are and the data position still advances.

        Raises:
            StepAbandoned: on every rank, after a stop was asked for; nothing has changed.
        """
        ...

    def validate(self, step: int) -> Mapping[str, float]:
        """Validation metrics after ``step``, equal on every rank; changes no state that training
        depends on.

        Random number generators are restored by the trainer. What has no turn at ``step`` is left
        out; empty: nothing to validate on. At the last step everything has its turn.

        Raises:
            StepAbandoned: on every rank, after a stop was asked for.
        """
        ...

    def start(self) -> None:
        """Prepare a run that begins at step 1; a resumed one gets :meth:`load` instead."""
        ...

    def save(self, folder: Path) -> StagedWrite | None:
        """Write parameters, optimizer and data position into the existing ``folder``, or return
        what is still to be written: with ``checkpoint.async_save`` that happens in the background.
        """
        ...

    def load(self, folder: Path) -> None:
        """Restore exactly what :meth:`save` wrote."""
        ...


@dataclass(kw_only=True, slots=True, frozen=True)
class FitResult:
    """A finished training: ``validation`` is that of the last step, ``checkpoint`` its folder.

    ``seconds`` counts all attempts; ``steps_made`` only this one (0: it was finished before).
    """

    step: int
    tokens: int
    seconds: float
    validation: dict[str, float]
    checkpoint: Path
    steps_made: int


def fit(task: TrainTask, *, config: RunConfig, run_dir: Path) -> FitResult:
    """Train ``task`` to ``stage.steps`` from wherever ``run_dir`` stands. Collective.

    A fresh folder starts at step 1, an interrupted one resumes from its newest valid checkpoint,
    a finished one trains nothing; in each case ``task`` holds the final state afterwards. A task
    that says it is ``finished`` ends earlier, validated and saved as at the last step, and for
    good: the checkpoint remembers why.

    Raises:
        Interrupted: a rank was asked to stop; everything is saved.
        Emu35Error: the guard refused too many steps in a row.
        CheckpointError: a checkpoint cannot be written, or those there do not fit this run.
    """
    manager = CheckpointManager(
        root=run_dir / CHECKPOINTS,
        config=config.checkpoint,
        identity=run_identity(config),
        message=_print,
    )
    found = manager.latest()
    progress = Progress.of(found)
    began = time.monotonic() - progress.seconds
    if found is not None and progress.is_finished(total=config.stage.steps):
        _load(task, checkpoint=found, message=_print)
        return _already_finished(progress, checkpoint=found)
    log = make_logger(
        config=config.log,
        run_dir=run_dir,
        name=config.name,
        total_steps=config.stage.steps,
        start_step=progress.step,
        rank=rank(),
    )
    watchdog = Watchdog(clock=task.clock, run_dir=run_dir, timeout=config.launch.timeout)
    with closing(log), closing(manager), StopRequest() as stop, watchdog:
        loop = _Loop(
            task=task,
            config=config,
            manager=manager,
            log=log,
            stop=stop,
            began=began,
            progress=progress,
            saved=found,
        )
        return loop.run()


@dataclass(kw_only=True, slots=True)
class _Loop:
    """The state of one call of :func:`fit`; ``saved`` is the newest good checkpoint."""

    task: TrainTask
    config: RunConfig
    manager: CheckpointManager
    log: Logger
    stop: StopRequest
    began: float
    progress: Progress
    saved: Checkpoint | None

    def run(self) -> FitResult:
        progress, total = self.progress, self.config.stage.steps
        first = progress.step
        self._start()
        self._leave_if_asked()
        meter = Meter(clock=self.task.clock, config=self.config.log)
        if self._validation_due():  # also what a stop left undone at the step that it saved
            self._validate()
            self._leave_if_asked()
        while not self._at_end():
            self._train_step(meter)
            self._leave_if_asked()
            self._finish_save(wait=False)
            if self._validation_due():
                self._validate()
                self._leave_if_asked()
            if self._checkpoint_due():
                self._save_meanwhile()
                self._leave_if_asked()
        early = ""
        if progress.step < total:
            progress.ended, early = self.task.finished or "", f" of {total}"
        saved = self._save()
        self.log.message(
            f"finished {progress.step}{early} steps, {progress.tokens:,} tokens, "
            f"{progress.seconds:.0f} s" + (f": {progress.ended}" if progress.ended else "")
        )
        return _result(progress, checkpoint=saved, steps_made=progress.step - first)

    def _at_end(self) -> bool:
        """Whether the step made last is the last one."""
        return self.progress.step >= self.config.stage.steps or self.task.finished is not None

    def _start(self) -> None:
        total = self.config.stage.steps
        if self.saved is None:
            with self._aside(Phase.loading):
                self.task.start()
            self.log.message(f"training {total} steps from the beginning")
            return
        if self.progress.guard:
            self.task.guard.load_state_dict(self.progress.guard)
        with self._aside(Phase.loading):
            _load(self.task, checkpoint=self.saved, message=self.log.message)
        self.log.message(f"resuming at step {self.saved.step}/{total} from {self.saved.path}")

    def _train_step(self, meter: Meter) -> None:
        step, total = self.progress.step + 1, self.config.stage.steps
        guard, clock = self.task.guard, self.task.clock
        clock.begin(step)
        try:
            metrics = dict(self.task.train_step(step))
        except StepAbandoned:
            self._leave_if_asked()
            raise AssertionError("a step was abandoned, but nobody was asked to stop") from None
        meter.count(metrics)
        self.progress.step = step
        self.progress.tokens += int(metrics.get("tokens", 0))
        metrics |= {"tokens_total": self.progress.tokens, "skipped_steps": guard.skipped}
        if is_row(step, every=self.config.log.every, total=total):
            measured, remarks = meter.row()
            metrics |= measured
            for remark in remarks:
                self.log.message(remark)
        if guard.reason:
            self.log.message(f"step {step} changed nothing: {guard.reason}")
        self.log.step(step, metrics)
        if guard.exhausted:
            self._finish_save_or_say()  # the message names the last good checkpoint
            raise Emu35Error(self._explain_exhausted())

    def _validation_due(self) -> bool:
        step, stage = self.progress.step, self.config.stage
        every = stage.validate_every
        due = self._at_end() or (every > 0 and step % every == 0)
        if step == 0:
            due = stage.validate_first
        return due and self.progress.validated_step != step

    def _checkpoint_due(self) -> bool:
        step, every = self.progress.step, self.config.checkpoint.every
        return every > 0 and step % every == 0 and not self._at_end()

    def _validate(self) -> None:
        with self._aside(Phase.validating), rng.preserved():
            try:
                metrics = self.task.validate(self.progress.step)
            except StepAbandoned:
                return  # it stays due
        found = {key: float(value) for key, value in metrics.items()}
        # At the last step everything has its turn: what is not among it, as a trouble that has
        # passed, is no longer true.
        at_last = self.progress.step >= self.config.stage.steps
        self.progress.validation = {**({} if at_last else self.progress.validation), **found}
        self.progress.validated_step = self.progress.step
        if found:
            self.log.validation(self.progress.step, found)

    def _save(self) -> Checkpoint:
        self._finish_save()
        self._note_before_saving()
        with self._aside(Phase.saving), rng.preserved():
            self.saved = self.manager.save(
                self.progress.step,
                write=self.task.save,
                write_alone=rng.save,
                extra=self.progress.extra(),
            )
        return self.saved

    @contextmanager
    def _aside(self, phase: Phase) -> Iterator[None]:
        """Time that is not training, to the person watching as well as to the clock."""
        with self.log.aside(phase.value), self.task.clock.marked(phase):
            yield

    def _save_meanwhile(self) -> None:
        """Let the next steps begin while this one is written, where the configuration says so."""
        if not self.config.checkpoint.async_save:
            self._save()
            return
        self._finish_save()
        self._note_before_saving()
        with self._aside(Phase.saving), rng.preserved():
            self.manager.begin(
                self.progress.step,
                write=self.task.save,
                write_alone=rng.save,
                extra=self.progress.extra(),
            )

    def _note_before_saving(self) -> None:
        self.progress.seconds = time.monotonic() - self.began
        self.progress.guard = self.task.guard.state_dict()
        self.log.flush()  # rows up to this step must not be lost when the checkpoint is not

    def _finish_save(self, *, wait: bool = True) -> None:
        """Complete a save in flight; without ``wait`` only if every rank has written its part."""
        if not self.manager.in_flight or not (wait or self.manager.is_written()):
            return
        with self._aside(Phase.saving), rng.preserved():
            self.saved = self.manager.finish()

    def _finish_save_or_say(self) -> None:
        """Complete a save in flight where something more important is to be told or saved."""
        try:
            self._finish_save()
        except CheckpointError as error:
            self.log.message(str(error))

    def _leave_if_asked(self) -> None:
        """Save and raise when some rank was asked to stop; one collective."""
        if not self.stop.on_any_rank():
            return
        self._finish_save_or_say()
        step, total = self.progress.step, self.config.stage.steps
        if step > 0 and (self.saved is None or self.saved.step != step):
            self._save()
        signal = self.stop.received
        text = (
            f"stopped by {signal.name if signal else 'a signal to another rank'} "
            f"at step {step}/{total}; "
            + (f"saved in {self.saved.path}" if self.saved else "nothing to save yet")
            + ". Run the same command again to resume"
        )
        self.log.close()
        # Leaving together: a launcher kills the remaining ranks as soon as the first one is gone.
        barrier()
        raise Interrupted(text)

    def _explain_exhausted(self) -> str:
        guard = self.task.guard
        known = (
            f"the newest good checkpoint is {self.saved.path}"
            if self.saved
            else "there is no checkpoint yet"
        )
        return (
            f"stopped at step {self.progress.step}: {guard.in_a_row} step(s) in a row could not "
            f"be used (guard.max_skipped={self.config.guard.max_skipped}); of the last one, "
            f"{guard.reason}. None of them changed the parameters; {known}. Look at the data of "
            "these steps. The same command with a higher guard.max_skipped (or spike factor) goes "
            "on past them; a lower optim.lr is another run: another run_dir, with stage.init_from "
            "naming this one"
        )


def _load(task: TrainTask, *, checkpoint: Checkpoint, message: Callable[[str], None]) -> None:
    task.load(checkpoint.path)
    if not rng.load(checkpoint.path):
        message(
            f"{checkpoint.path} was written in another layout: data, parameters and optimizer "
            "continue exactly, random numbers (dropout) start from the seed again"
        )


def _already_finished(progress: Progress, *, checkpoint: Checkpoint) -> FitResult:
    found = "".join(f"  {key} {value:.4f}" for key, value in progress.validation.items())
    why = f" ({progress.ended})" if progress.ended else ""
    _print(f"already finished: {progress.step} steps{why}, {checkpoint.path}{found}")
    return _result(progress, checkpoint=checkpoint, steps_made=0)


def _result(progress: Progress, *, checkpoint: Checkpoint, steps_made: int) -> FitResult:
    return FitResult(
        step=progress.step,
        tokens=progress.tokens,
        seconds=progress.seconds,
        validation=dict(progress.validation),
        checkpoint=checkpoint.path,
        steps_made=steps_made,
    )


def _print(text: str) -> None:
    if is_main():
        print(text, flush=True)
