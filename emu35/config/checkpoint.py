"""When checkpoints are written and how many are kept."""

from collections.abc import Iterator
from dataclasses import dataclass

from emu35.config.check import at_least


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """A checkpoint every ``every`` steps (0: only at the end); the newest ``keep_last`` stay,
    and so does every multiple of ``keep_every`` (0: none). With ``async_save`` training goes on
    while a checkpoint is written, at the price of a copy of each rank's share in host memory."""

    every: int = 100
    keep_last: int = 2
    keep_every: int = 0
    async_save: bool = False

    def problems(self) -> Iterator[str]:
        yield from at_least("checkpoint", 0, every=self.every, keep_every=self.keep_every)
        yield from at_least("checkpoint", 1, keep_last=self.keep_last)
