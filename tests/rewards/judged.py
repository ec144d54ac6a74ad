"""Samples, and rewards with faults that happen on demand."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emu35.config.reward import RewardConfig
from emu35.rewards.pool import RewardPool
from emu35.rewards.sample import Cost, Picture, Range, Record, Sample, Score


def sample(*, pictures: Sequence[Picture] = (), prompt: str = "a cat", **record: Any) -> Sample:
    texts = [""] * (len(pictures) + 1)
    return Sample(record=record, task="t2i", prompt=prompt, texts=texts, pictures=pictures)


def picture(level: int = 128) -> Picture:
    return np.full((8, 8, 3), level, dtype=np.uint8)


class Faulty:
    """A reward of a plain function; it remembers its batches, and how many at once."""

    def __init__(self, judge: Callable[[Sample], Score], *, range: Range | None = None) -> None:
        self.range = range or Range(low=0.0, high=1.0)
        self.cost = Cost.cpu
        self._judge = judge
        self.batches: list[int] = []
        self.at_once = 0
        self.most_at_once = 0
        self._lock = threading.Lock()

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        with self._lock:
            self.batches.append(len(samples))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return [self._judge(item) for item in samples]
        finally:
            with self._lock:
                self.at_once -= 1

    def problems(self, record: Record) -> list[str]:
        return []


def config(**changes: Any) -> RewardConfig:
    settings: dict[str, Any] = {"timeout": 5.0, "retries": 0, "backoff": 0.0, **changes}
    return RewardConfig(**settings)


def pool_of(judge: Callable[[Sample], Score], **changes: Any) -> RewardPool:
    """A pool with one reward, ``own``."""
    return RewardPool({"own": Faulty(judge)}, configs={"own": config(**changes)})


def until(true: Callable[[], bool], *, seconds: float = 10.0) -> None:
    """Wait for what another thread brings about."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)
