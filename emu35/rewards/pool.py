"""Rewards at work beside generation.

Whoever has an answer submits it and goes on. Every reward has workers and a queue of its own
(:mod:`emu35.rewards.lane`), so that a slow one holds up no other. A call that fails is repeated,
one that takes too long is given up, and what has no score in the end says why: no number is made
up.

A thread cannot be ended from outside. One whose call was given up is left to itself, another takes
its place, and what it gives after all is thrown away; none of them keeps the process from ending.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from emu35.config.reward import RewardConfig
from emu35.rewards.call import checked
from emu35.rewards.counts import PoolCounts
from emu35.rewards.lane import MOST_LOST, Call, Item, Lane
from emu35.rewards.sample import Reward, Sample, Score
from emu35.rewards.scale import source_ranges

CLOSED = "the pool was closed before it was judged"
CANCELLED = "it was cancelled before it was judged"


@runtime_checkable
class Closing(Protocol):
    """A reward that holds something open."""

    def close(self) -> None: ...


class Ticket:
    """An answer that is being judged; made by :meth:`RewardPool.submit`."""

    def __init__(self, sample: Sample, *, rewards: Sequence[str], pool: "RewardPool") -> None:
        self.sample = sample
        self.rewards = tuple(rewards)
        self._pool = pool
        self._scores: dict[str, Score] = {}
        self._complete = threading.Event()
        if not self.rewards:
            self._complete.set()

    @property
    def done(self) -> bool:
        """Whether every reward has an outcome."""
        return self._complete.is_set()

    def result(self, timeout: float | None = None) -> Mapping[str, Score]:
        """The outcome of every reward, in the order asked for; waits up to ``timeout`` seconds
        (None: for as long as it takes, which the timeouts of the rewards bound).

        Raises:
            TimeoutError: there is none yet.
        """
        if not self.done:
            with self._pool.waiting():
                self._complete.wait(timeout)
        if not self.done:
            missing = [name for name in self.rewards if name not in self._scores]
            raise TimeoutError(f"{self.sample.where}: no score of {', '.join(missing)} yet")
        return {name: self._scores[name] for name in self.rewards}

    def cancel(self) -> None:
        """Ask no reward that has not begun; those get no score. The ticket completes all the
        same."""
        self._pool.cancel(self)

    def settle(self, name: str, *, score: Score) -> None:
        """For the pool: take the outcome of a reward."""
        self._scores[name] = score
        if len(self._scores) == len(self.rewards):
            self._complete.set()


class RewardPool:
    """Workers for ``rewards``, each as its entry of ``configs`` says. At most ``queue`` outcomes
    are outstanding; beyond that :meth:`submit` waits. Nothing runs before the first submission.

    Raises:
        ConfigError: a reward has no range.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        *,
        configs: Mapping[str, RewardConfig],
        queue: int = 4096,
    ) -> None:
        assert queue >= 1
        self.ranges = source_ranges(rewards, configs=configs)
        self._lanes = {
            name: Lane(name=name, reward=reward, config=configs[name], range=self.ranges[name])
            for name, reward in rewards.items()
        }
        self._queue = queue
        # Settling a ticket happens under the lock, which waits for nothing.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._threads: set[threading.Thread] = set()
        self._watching = False
        self._closed = False
        self._items: dict[Ticket, dict[str, Item]] = {}
        self._outstanding = 0
        self._made = time.monotonic()
        self._busy_since = 0.0
        self._busy = 0.0
        self._waited = 0.0

    def submit(self, sample: Sample, *, rewards: Sequence[str]) -> Ticket:
        """Have ``sample`` judged by the rewards called so; waits where the queue is full.

        Raises:
            RuntimeError: the pool is closed.
        """
        names = list(dict.fromkeys(rewards))
        ticket = Ticket(sample, rewards=names, pool=self)
        with self._lock:
            if self._outstanding >= self._queue:
                with self.waiting():
                    self._changed.wait_for(lambda: self._closed or self._outstanding < self._queue)
            if self._closed:
                raise RuntimeError("the pool of rewards is closed")
            lanes = [self._lanes[name] for name in names]
            items = {
                lane.name: Item(sample=sample, settle=self._settler(ticket, name=lane.name))
                for lane in lanes
            }
            if items:
                self._items[ticket] = items
            self._count(len(items))
            for lane in lanes:
                self._staff(lane)
                lane.add(items[lane.name])
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """:meth:`Ticket.cancel`."""
        with self._lock:
            for name, item in list(self._items.get(ticket, {}).items()):
                self._lanes[name].cancel(item, reason=CANCELLED)

    def snapshot(self) -> PoolCounts:
        """All counts since the pool was made."""
        with self._lock:
            now = time.monotonic()
            busy = self._busy + (now - self._busy_since if self._outstanding else 0.0)
            return PoolCounts(
                rewards={name: replace(lane.counts) for name, lane in self._lanes.items()},
                elapsed_seconds=now - self._made,
                busy_seconds=busy,
                waited_seconds=self._waited,
            )

    def close(self, *, grace: float = 2.0) -> None:
        """End the workers. What has not been judged gets no score; calls under way may take
        ``grace`` seconds more, and are then left to themselves."""
        with self._lock:
            self._closed = True
            for lane in self._lanes.values():
                lane.clear(CLOSED)
            self._changed.notify_all()
            threads = list(self._threads)
        until = time.monotonic() + grace
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        with self._lock:
            now = time.monotonic()
            for lane in self._lanes.values():
                for call in list(lane.calls):
                    lane.drop(call, reason=CLOSED, now=now)
                # What failed in the meantime waits again.
                lane.clear(CLOSED)
        for lane in self._lanes.values():
            if isinstance(lane.reward, Closing):
                lane.reward.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For tickets: count the time that somebody stands still for the pool."""
        begin = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._waited += time.monotonic() - begin

    def _settler(self, ticket: Ticket, *, name: str) -> Callable[[Score], None]:
        def settle(score: Score) -> None:
            items = self._items[ticket]
            del items[name]
            if not items:
                del self._items[ticket]
            self._count(-1)
            ticket.settle(name, score=score)
            self._changed.notify_all()

        return settle

    def _count(self, change: int) -> None:
        """Keep the books of what is outstanding, and of the time that anything is."""
        before, self._outstanding = self._outstanding, self._outstanding + change
        if not before and self._outstanding:
            self._busy_since = time.monotonic()
        elif before and not self._outstanding:
            self._busy += time.monotonic() - self._busy_since

    # ------------------------------------------------------------------ threads

    def _staff(self, lane: Lane) -> None:
        """Start the workers that ``lane`` lacks, and what watches them."""
        while lane.workers < lane.config.concurrency and lane.lost < MOST_LOST:
            lane.workers += 1
            self._start(lambda: self._work(lane), name=f"reward-{lane.name}")
        if not self._watching:
            self._watching = True
            self._start(self._watch, name="reward-watch")

    def _start(self, run: Callable[[], None], *, name: str) -> None:
        def body() -> None:
            try:
                run()
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        # A daemon: one that never returns must not keep the process from ending.
        thread = threading.Thread(target=body, name=name, daemon=True)
        self._threads.add(thread)
        thread.start()

    def _work(self, lane: Lane) -> None:
        """Judge what is due until the pool is closed, or the lane has enough workers without."""
        while (call := self._next(lane)) is not None:
            scores: list[Score] = []
            failure: BaseException | None = None
            try:
                found = lane.reward.score([item.sample for item in call.items])
                scores = checked(found, of=len(call.items))
            # Whatever it raises, sys.exit() in somebody's function included, ends the call alone.
            except BaseException as error:
                failure = error
            with self._lock:
                now = time.monotonic()
                if call.lost:
                    lane.lost -= 1
                    lane.counts.late += 1
                    if self._closed or lane.workers >= lane.config.concurrency:
                        return
                    lane.workers += 1
                elif failure is not None:
                    lane.failed(call, error=failure, now=now)
                else:
                    lane.scored(call, scores=scores, now=now)
                self._changed.notify_all()

    def _next(self, lane: Lane) -> Call | None:
        """The next call of ``lane`` as soon as one is due; None when the pool is closed."""
        with self._lock:
            while not self._closed:
                now, due = time.monotonic(), lane.due()
                if due is not None and due <= now:
                    call = lane.begin(now)
                    self._changed.notify_all()
                    return call
                self._changed.wait(None if due is None else due - now)
            lane.workers -= 1
            return None

    def _watch(self) -> None:
        """Give up calls that run for too long, and replace their workers."""
        with self._lock:
            while not self._closed:
                now = time.monotonic()
                for lane in self._lanes.values():
                    for call in [call for call in lane.calls if call.deadline <= now]:
                        lane.lose(call, now=now)
                        self._staff(lane)
                deadlines = [call.deadline for lane in self._lanes.values() for call in lane.calls]
                self._changed.wait(min(deadlines) - now if deadlines else None)
