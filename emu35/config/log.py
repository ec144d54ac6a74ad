"""Where metrics go."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from emu35.config.check import at_least


class WandbMode(StrEnum):
    """``offline`` writes to the run folder and needs no account."""

    off = "off"
    offline = "offline"
    online = "online"


@dataclass(kw_only=True, slots=True)
class LogConfig:
    """Console and ``metrics.jsonl`` always; TensorBoard and wandb on demand.

    ``peak_tflops`` is what one device can do at most, for the utilisation ``mfu``; 0 takes the
    dense bf16 figure of a known GPU, and elsewhere reports no utilisation. A rank whose own work
    takes more than ``straggler_ratio`` times the median of its peers is named (0: never). Waiting
    for data that takes more than ``starved_share`` of a step is said (0: never).
    """

    every: int = 10
    peak_tflops: float = 0.0
    straggler_ratio: float = 1.5
    starved_share: float = 0.1
    tensorboard: bool = False
    wandb: WandbMode = WandbMode.off
    wandb_project: str = "emu35"

    def problems(self) -> Iterator[str]:
        yield from at_least("log", 1, every=self.every)
        yield from at_least("log", 0, peak_tflops=self.peak_tflops)
        if not 0.0 <= self.starved_share < 1.0:
            yield f"log.starved_share={self.starved_share} is a share of a step; use [0, 1)"
        if self.straggler_ratio != 0.0 and self.straggler_ratio <= 1.0:
            yield (
                f"log.straggler_ratio={self.straggler_ratio} would name ordinary ranks; use a "
                "number above 1, or 0 to name none"
            )
