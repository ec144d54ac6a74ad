"""One reward's queue: what waits, what runs, what is due again. No threads and no lock of its own:
:mod:`emu35.rewards.pool` has both."""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from emu35.config.reward import RewardConfig
from emu35.rewards.call import RewardFailed, told
from emu35.rewards.counts import RewardCounts
from emu35.rewards.sample import Range, Reward, Sample, Score, Unscored

MOST_LOST = 16
"""Calls of a reward that were given up and still run, at which no further one is begun: a thread
cannot be ended from outside, and more of them would not come back either."""

JITTER = 0.25
"""Waits before a repetition are longer by up to this share, so that many do not return at once."""


@dataclass(kw_only=True, slots=True, eq=False)
class Item:
    """A sample that waits for a reward; ``settle`` takes the outcome. ``failed`` calls lie behind
    it."""

    sample: Sample
    settle: Callable[[Score], None]
    failed: int = 0
    cancelled: bool = False


@dataclass(kw_only=True, slots=True, eq=False)
class Call:
    """A call under way; given up (``lost``) at ``deadline``."""

    items: list[Item]
    begin: float
    deadline: float
    lost: bool = False


@dataclass(kw_only=True, slots=True)
class Lane:
    """The queue of the reward called ``name``. Every method that takes ``now`` means the time of
    :func:`time.monotonic`."""

    name: str
    reward: Reward
    config: RewardConfig
    range: Range
    counts: RewardCounts = field(default_factory=RewardCounts)
    workers: int = 0
    lost: int = 0
    calls: list[Call] = field(default_factory=list[Call])
    _ready: deque[Item] = field(default_factory=deque[Item])
    _later: list[tuple[float, int, Item]] = field(default_factory=list[tuple[float, int, Item]])
    _tie: "itertools.count[int]" = field(default_factory=itertools.count)
    # Of its own: the state of the global one belongs to the run.
    _jitter: random.Random = field(default_factory=random.Random)
    _not_before: float = 0.0

    def add(self, item: Item) -> None:
        if self.workers == 0 and self.lost >= MOST_LOST:
            self._give_up(item, f"{self.lost} calls that timed out still run; no other is begun")
        else:
            self._ready.append(item)

    def due(self) -> float | None:
        """When there is something to begin; None where nothing waits."""
        if self._ready:
            return self._not_before
        return max(self._later[0][0], self._not_before) if self._later else None

    def begin(self, now: float) -> Call:
        """Take the next call, where one is due: a sample that failed before alone, so that it
        cannot take others down with it, and else as many as may go together."""
        while self._later and self._later[0][0] <= now:
            self._ready.appendleft(heapq.heappop(self._later)[2])
        items = [self._ready.popleft()]
        while (
            self._ready
            and len(items) < self.config.batch_size
            and not items[0].failed
            and not self._ready[0].failed
        ):
            items.append(self._ready.popleft())
        call = Call(items=items, begin=now, deadline=now + self.config.timeout)
        self.calls.append(call)
        return call

    def scored(self, call: Call, *, scores: Iterable[Score], now: float) -> None:
        """The call gave ``scores``."""
        self._end(call, now=now)
        for item, score in zip(call.items, scores, strict=True):
            if isinstance(score, Unscored):
                self.counts.unscored += 1
            else:
                low, high = sorted((self.range.low, self.range.high))
                self.counts.clamped += not low <= score <= high
            self.counts.samples += 1
            item.settle(score)

    def failed(self, call: Call, *, error: BaseException, now: float) -> None:
        """The call gave nothing: its samples are asked about again, or have no score."""
        self._end(call, now=now)
        known = error if isinstance(error, RewardFailed) else None
        if known is not None and known.timed_out:
            self.counts.timeouts += 1
        else:
            self.counts.failures += 1
        after = 0.0
        if known is not None and known.after is not None:
            # Whoever asks for longer than a call may take is asked again sooner all the same.
            after = min(known.after, self.config.timeout)
            self._not_before = max(self._not_before, now + after)
        for item in call.items:
            item.failed += 1
            if item.cancelled or (known is not None and not known.repeat):
                self._give_up(item, told(error))
            elif item.failed > self.config.retries:
                times = "once" if item.failed == 1 else f"{item.failed} times"
                self._give_up(item, f"{told(error)} (asked {times})")
            else:
                self.counts.retries += 1
                wait = self.config.backoff * 2 ** (item.failed - 1)
                wait *= 1 + JITTER * self._jitter.random()
                heapq.heappush(self._later, (now + max(wait, after), next(self._tie), item))

    def lose(self, call: Call, *, now: float) -> None:
        """Give up a call that runs for too long. Its worker is lost with it."""
        self._leave(call)
        message = f"no answer within {self.config.timeout:g} s"
        self.failed(call, error=RewardFailed(message, timed_out=True), now=now)
        if self.workers == 0 and self.lost >= MOST_LOST:
            self.clear(f"{self.lost} calls that timed out still run; no other is begun")

    def drop(self, call: Call, *, reason: str, now: float) -> None:
        """Leave a call alone whose scores are not wanted any more."""
        self._leave(call)
        self._end(call, now=now)
        for item in call.items:
            self._give_up(item, reason)

    def clear(self, reason: str) -> None:
        """Everything that waits gets no score."""
        waiting = [*self._ready, *(item for _, _, item in self._later)]
        self._ready.clear()
        self._later.clear()
        for item in waiting:
            self._give_up(item, reason)

    def cancel(self, item: Item, *, reason: str) -> None:
        """Forget an item that waits; one that is being judged is not asked about again."""
        item.cancelled = True
        waits = item in self._ready
        if waits:
            self._ready.remove(item)
        else:
            left = [entry for entry in self._later if entry[2] is not item]
            waits = len(left) < len(self._later)
            self._later = left
            heapq.heapify(self._later)
        if waits:
            self._give_up(item, reason)

    def _leave(self, call: Call) -> None:
        call.lost = True
        self.lost += 1
        self.workers -= 1

    def _end(self, call: Call, *, now: float) -> None:
        self.calls.remove(call)
        self.counts.calls += 1
        self.counts.seconds += now - call.begin

    def _give_up(self, item: Item, reason: str) -> None:
        self.counts.samples += 1
        self.counts.unscored += 1
        item.settle(Unscored(f"reward {self.name}: {reason}"))
