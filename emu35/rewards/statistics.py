"""How the scores of each reward develop: mean, spread, what is clamped, and drift.

Ranks count their own answers of a step, and all of them take in the sums of all, so that every
rank has the same statistics and a checkpoint needs one copy::

    step = StepSums(ranges)
    step.add(scores, task="t2i")
    statistics.take([StepSums.from_json(part, ranges=ranges) for part in gathered])
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from emu35.errors import CheckpointError
from emu35.rewards.sample import Range
from emu35.rewards.scale import SCALE, Scores

TOTAL = "*"
"""The name under which the total of a task, in [1, 10], stands among its rewards."""

Key = tuple[str, str]
"""Task and reward."""


@dataclass(kw_only=True, slots=True)
class Sums:
    """Sums over scores, in fractions of the source range: there they are of the size of 1, whatever
    a reward counts in, and their squares lose nothing. ``low`` and ``high`` are the extremes."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    clamped: int = 0
    unscored: int = 0

    def add(self, value: float, *, clamped: bool) -> None:
        self.count += 1
        self.total += value
        self.squares += value * value
        self.low, self.high = min(self.low, value), max(self.high, value)
        self.clamped += clamped

    def take(self, other: "Sums") -> None:
        """Add those of others."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.clamped += other.clamped
        self.unscored += other.unscored

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def std(self) -> float:
        """Of the scores themselves, not an estimate for others."""
        return math.sqrt(max(0.0, self.squares / self.count - self.mean**2))

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        # JSON has no infinities.
        return found if self.count else {**found, "low": None, "high": None}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Sums":
        values = {name: value for name, value in plain.items() if value is not None}
        return cls(**values)


class StepSums:
    """The scores of one step, on one rank."""

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        self._ranges = {**ranges, TOTAL: SCALE}
        self.sums: dict[Key, Sums] = {}

    def add(self, scores: Scores, *, task: str) -> None:
        """Count one answer."""
        for name, raw in scores.raw.items():
            self._add((task, name), value=raw, clamped=name in scores.clamped)
        for name in scores.unscored:
            self._of((task, name)).unscored += 1
        if scores.total is None:
            self._of((task, TOTAL)).unscored += 1
        else:
            self._add((task, TOTAL), value=scores.total, clamped=False)

    def to_json(self) -> list[list[Any]]:
        """For other ranks."""
        return [[task, name, sums.to_json()] for (task, name), sums in self.sums.items()]

    @classmethod
    def from_json(
        cls, plain: Sequence[Sequence[Any]], *, ranges: Mapping[str, Range]
    ) -> "StepSums":
        """What :meth:`to_json` gave."""
        step = cls(ranges)
        step.sums = {(task, name): Sums.from_json(sums) for task, name, sums in plain}
        return step

    def _of(self, key: Key) -> Sums:
        return self.sums.setdefault(key, Sums())

    def _add(self, key: Key, *, value: float, clamped: bool) -> None:
        source = self._ranges[key[1]]
        share = (value - source.low) / (source.high - source.low)
        self._of(key).add(share, clamped=clamped)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Of one reward on one task since the run began, in the reward's own range.

    ``std`` is None without a score, like ``mean`` and the extremes. ``clamp_rate`` is a share of
    the scores, ``unscored_rate`` of the answers. ``drift`` is by how many standard deviations of
    the first window the mean of the newest lies above that of the first, towards better; None until
    there are both.
    """

    count: int
    mean: float | None
    std: float | None
    lowest: float | None
    highest: float | None
    clamp_rate: float
    unscored_rate: float
    drift: float | None


@dataclass(kw_only=True, slots=True)
class _Course:
    """One reward on one task: all steps, the first ones, and the newest behind those."""

    whole: Sums = field(default_factory=Sums)
    first: Sums = field(default_factory=Sums)
    first_steps: int = 0
    newest: deque[Sums] = field(default_factory=deque[Sums])

    def take(self, sums: Sums, *, window: int) -> None:
        self.whole.take(sums)
        if not sums.count:
            return
        if self.first_steps < window:
            self.first.take(sums)
            self.first_steps += 1
            return
        self.newest.append(sums)
        if len(self.newest) > window:
            self.newest.popleft()

    @property
    def drift(self) -> float | None:
        if not self.newest:
            return None
        newest = Sums()
        for sums in self.newest:
            newest.take(sums)
        # Where the first ones were all alike, the spread of the whole run measures the shift.
        spread = self.first.std or self.whole.std
        return (newest.mean - self.first.mean) / spread if spread > 0 else 0.0


class RewardStatistics:
    """The statistics of all tasks and rewards; windows of ``window`` steps are compared for drift.

    Equal on all ranks as long as all :meth:`take` the same.
    """

    def __init__(self, ranges: Mapping[str, Range], *, window: int = 20) -> None:
        assert window >= 1
        self._ranges = {**ranges, TOTAL: SCALE}
        self._window = window
        self._courses: dict[Key, _Course] = {}

    def take(self, ranks: Sequence[StepSums]) -> None:
        """A step is over: take in what each rank counted, in the order of ranks."""
        step: dict[Key, Sums] = {}
        for rank in ranks:
            for key, sums in rank.sums.items():
                step.setdefault(key, Sums()).take(sums)
        for key, sums in step.items():
            self._courses.setdefault(key, _Course()).take(sums, window=self._window)

    def summaries(self) -> dict[Key, Summary]:
        """By task and reward; a task's total is called :data:`TOTAL`."""
        return {key: self._summary(key, course) for key, course in self._courses.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {
            "window": self._window,
            "ranges": {name: [found.low, found.high] for name, found in self._ranges.items()},
            "courses": [
                [
                    *key,
                    course.whole.to_json(),
                    course.first.to_json(),
                    course.first_steps,
                    [sums.to_json() for sums in course.newest],
                ]
                for key, course in self._courses.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            CheckpointError: it is of rewards with other ranges, with which its sums mean nothing.
        """
        for name, found in self._ranges.items():
            saved = state["ranges"].get(name)
            if saved is not None and saved != [found.low, found.high]:
                raise CheckpointError(
                    f"the statistics of reward {name} were kept for the range {saved} and it is "
                    f"[{found.low}, {found.high}] now; keep the range, or start another run"
                )
        self._window = state["window"]
        self._courses = {
            (task, name): _Course(
                whole=Sums.from_json(whole),
                first=Sums.from_json(first),
                first_steps=first_steps,
                newest=deque(Sums.from_json(sums) for sums in newest),
            )
            for task, name, whole, first, first_steps, newest in state["courses"]
            # A reward that the run has no more has no range either.
            if name in self._ranges
        }

    def _summary(self, key: Key, course: _Course) -> Summary:
        whole, source = course.whole, self._ranges[key[1]]
        width = source.high - source.low
        answers = whole.count + whole.unscored
        rates = {
            "count": whole.count,
            "clamp_rate": whole.clamped / whole.count if whole.count else 0.0,
            "unscored_rate": whole.unscored / answers if answers else 0.0,
            "drift": course.drift,
        }
        if not whole.count:
            return Summary(mean=None, std=None, lowest=None, highest=None, **rates)
        ends = sorted((source.low + whole.low * width, source.low + whole.high * width))
        return Summary(
            mean=source.low + whole.mean * width,
            std=whole.std * abs(width),
            lowest=ends[0],
            highest=ends[1],
            **rates,
        )
