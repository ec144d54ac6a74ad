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
    """Console and ``metrics.jsonl`` always; TensorBoard and wandb on demand."""

    every: int = 10
    tensorboard: bool = False
    wandb: WandbMode = WandbMode.off
    wandb_project: str = "emu35"

    def problems(self) -> Iterator[str]:
        yield from at_least("log", 1, every=self.every)
