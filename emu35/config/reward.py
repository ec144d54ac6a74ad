"""Rewards: what each is called, how its numbers are read, and how it may be asked."""

from collections.abc import Iterator
from dataclasses import dataclass

from emu35.config.check import at_least


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """Base of every reward; ``kind`` selects the class.

    A score in the source range [``low``, ``high``] is mapped linearly to [1, 10] (paper section
    4.2.1) and clamped; None takes the range that the reward itself declares. With ``low`` above
    ``high`` smaller scores are better. ``concurrency`` calls run at once on each replica, each of
    up to ``batch_size`` samples, and each may take ``timeout`` seconds. What a call failed at is
    asked again ``retries`` times, after ``backoff`` seconds, then twice as many, and so on.
    """

    kind: str = "scene"
    low: float | None = None
    high: float | None = None
    concurrency: int = 1
    batch_size: int = 1
    timeout: float = 60.0
    retries: int = 2
    backoff: float = 1.0

    def problems(self, name: str) -> Iterator[str]:
        """What is wrong with the reward called ``name``."""
        where = f"stage.rewards.{name}"
        yield from at_least(where, 1, concurrency=self.concurrency, batch_size=self.batch_size)
        yield from at_least(where, 0, retries=self.retries, backoff=self.backoff)
        if not self.timeout > 0:
            yield f"{where}.timeout={self.timeout} must be positive (seconds a call may take)"
        if (self.low is None) != (self.high is None):
            yield f"{where}: low and high are one range; give both, or neither"
        elif self.low is not None and self.low == self.high:
            yield f"{where}: low and high are both {self.low}; a range needs two ends"


@dataclass(kw_only=True, slots=True)
class SceneRewardConfig(RewardConfig):
    """The share of a described scene's attributes that a picture shows; a program reads them."""

    kind: str = "scene"


@dataclass(kw_only=True, slots=True)
class FunctionRewardConfig(RewardConfig):
    """Anybody's own: ``function`` is ``package.module:function`` of (record, pictures). Its range
    must be given."""

    kind: str = "function"
    function: str = ""

    def problems(self, name: str) -> Iterator[str]:
        # Zero-argument super() fails in slotted dataclasses (the class is rebuilt).
        yield from RewardConfig.problems(self, name)
        where = f"stage.rewards.{name}"
        if ":" not in self.function:
            yield f"{where}.function={self.function!r} names none; write package.module:function"
        if self.low is None:
            yield f"{where} declares no range by itself; give low and high"
