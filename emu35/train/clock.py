"""Where a rank stands and what its time goes to.

A task marks the phases of its step on a :class:`StepClock`. Three readers live on these marks: the
time breakdown of the metrics, the report of slow ranks (:mod:`emu35.train.measure`) and the
watchdog (:mod:`emu35.train.watchdog`).
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

import torch


class Phase(StrEnum):
    """What a rank does. Those of :data:`ASIDE` are not training, those of :data:`ROUND` belong to
    reinforcement learning, and ``other`` is the rest of a step: weighing tokens, agreeing with
    other ranks, logging."""

    data = "data"
    forward_backward = "forward_backward"
    reduction = "reduction"
    optimizer = "optimizer"
    other = "other"
    sampling = "sampling"
    scoring = "scoring"
    replay = "replay"
    loading = "loading"
    validating = "validating"
    saving = "saving"


ROUND = (Phase.sampling, Phase.scoring, Phase.replay)
ASIDE = (Phase.loading, Phase.validating, Phase.saving)
STEP_PHASES = tuple(phase for phase in Phase if phase not in ASIDE)


class StepClock:
    """Marks of one rank, in seconds.

    Args:
        device: where the step computes. With CUDA the end of a phase waits for the device, so that
            a phase is charged with its own kernels: a few waits a step.
        peers: ranks with the same number do the same work and can be compared (the pipeline
            stage, say).

    Attributes:
        step: the step being made, 0 before the first.
        phase: the innermost phase.
        moves: phases entered or left so far; the same at the same point on all ranks.
        moved_at: ``time.monotonic()`` of the last sign of progress.
    """

    def __init__(self, *, device: torch.device | None = None, peers: int = 0) -> None:
        self.device = device or torch.device("cpu")
        self.peers = peers
        self._cuda = self.device.type == "cuda"
        self.step, self.moves = 0, 0
        self.moved_at = time.monotonic()
        self._phases: list[Phase] = []
        self._seconds: defaultdict[Phase, float] = defaultdict(float)
        self._own_seconds = 0.0
        self._own_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._steps = 0
        self._charged_at = time.perf_counter()

    @property
    def phase(self) -> Phase:
        return self._phases[-1] if self._phases else Phase.other

    def begin(self, step: int) -> None:
        """Step ``step`` starts."""
        self.step = step
        self._steps += 1
        self._move()

    def beat(self) -> None:
        """Something went on inside a phase: a micro-batch, a validation batch."""
        self.moved_at = time.monotonic()

    @contextmanager
    def marked(self, phase: Phase) -> Iterator[None]:
        """Charge the body to ``phase``; a phase inside it is charged for itself. Inside a phase of
        ``ASIDE`` everything belongs to that phase."""
        self._charge()
        aside = self._phases and self._phases[0] in ASIDE
        self._phases.append(self._phases[0] if aside else phase)
        self._move()
        try:
            yield
            if self._cuda and not aside:
                torch.cuda.synchronize()
        finally:
            self._charge()
            self._phases.pop()
            self._move()

    @contextmanager
    def own(self) -> Iterator[None]:
        """The body is work of this rank alone, which waits for nobody: what slow ranks are told
        by. Counts inside ``forward_backward`` only. The collectives that tensor and context
        parallelism make inside a layer cannot be taken out, so the ranks of one such group
        show the time of their slowest."""
        if self.phase is not Phase.forward_backward:
            yield
        elif self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._own_events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._own_seconds += time.perf_counter() - began

    def take(self) -> "StepTimes":
        """The marks since the last call, per step; starts anew."""
        self._charge()
        if self._own_events:
            torch.cuda.synchronize()
            milliseconds = sum(start.elapsed_time(end) for start, end in self._own_events)
            self._own_seconds += milliseconds / 1e3
        steps = max(1, self._steps)
        times = StepTimes(
            steps=self._steps,
            seconds={phase: self._seconds[phase] / steps for phase in STEP_PHASES},
            own=(self._own_seconds + self._seconds[Phase.data]) / steps,
        )
        self._seconds.clear()
        self._own_events.clear()
        self._own_seconds, self._steps = 0.0, 0
        return times

    def _move(self) -> None:
        self.moves += 1
        self.beat()

    def _charge(self) -> None:
        now = time.perf_counter()
        self._seconds[self.phase] += now - self._charged_at
        self._charged_at = now


@dataclass(kw_only=True, slots=True, frozen=True)
class StepTimes:
    """Means over ``steps`` steps, in seconds: ``seconds`` by phase, which sum to the step; ``own``
    of this rank's own work, loading data included."""

    steps: int
    seconds: dict[Phase, float]
    own: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def metrics(self) -> dict[str, float]:
        """``time/PHASE`` for each part of a step (of :data:`ROUND`, those that there were), and
        ``time/step``."""
        parts = {
            f"time/{phase}": value
            for phase, value in self.seconds.items()
            if value or phase not in ROUND
        }
        return {"time/step": self.total, **parts}
