"""Where the ranks run."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from emu35.config.check import at_least


class LaunchKind(StrEnum):
    """``local``: processes on this host. ``torchrun`` and ``slurm``: one or several nodes."""

    local = "local"
    torchrun = "torchrun"
    slurm = "slurm"


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """``nodes`` x ``nproc`` ranks; ``timeout`` is that of a collective, in seconds."""

    kind: LaunchKind = LaunchKind.local
    nodes: int = 1
    nproc: int = 1
    threads: int = 0
    timeout: int = 600

    @property
    def world_size(self) -> int:
        return self.nodes * self.nproc

    def problems(self) -> Iterator[str]:
        yield from at_least("launch", 1, nodes=self.nodes, nproc=self.nproc, timeout=self.timeout)
        yield from at_least("launch", 0, threads=self.threads)
        if self.kind is LaunchKind.local and self.nodes != 1:
            yield f"launch.nodes={self.nodes} with launch=local; use launch=torchrun or slurm"
