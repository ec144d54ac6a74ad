"""The ranks of one data-parallel replica as a team of samplers.

Tensor-parallel ranks sample together. The others of a replica (pipeline stages, context-parallel
ranks) hold the same weights, or a copy of all of them, so each samples a part of the replica's
prompts, and afterwards all of them know everything: they will train on it together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from emu35.parallel.collectives import sum_over
from emu35.parallel.mesh import Mesh

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """This rank's place among those that sample."""

    mesh: Mesh

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its tensor-parallel group: it judges answers."""
        return self.mesh.tp_rank == 0

    @property
    def samplers(self) -> int:
        """How many groups of tensor-parallel ranks sample, in all replicas."""
        return self.mesh.dp_size * self._teams

    @property
    def _teams(self) -> int:
        return self.mesh.pp_size * self.mesh.cp_size

    def share(self, items: Sequence[Item]) -> list[Item]:
        """The items of this replica: every dp-th."""
        return list(items[self.mesh.dp_rank :: self.mesh.dp_size])

    def part(self, items: Sequence[Item]) -> list[Item]:
        """Those of the replica's items that this rank samples."""
        team = self.mesh.pp_rank * self.mesh.cp_size + self.mesh.cp_rank
        return list(items[team :: self._teams])

    def joined(self, parts: Sequence[Item]) -> list[Item]:
        """Undo :meth:`part`: what all samplers of the replica have, in order. Collective."""
        every = [list(parts)]
        for group, size in (
            (self.mesh.cp_group, self.mesh.cp_size),
            (self.mesh.pp_group, self.mesh.pp_size),
        ):
            if size > 1:
                gathered: list[Any] = [None] * size
                dist.all_gather_object(gathered, every, group=group)
                every = [part for parts in gathered for part in parts]
        total = sum(map(len, every))
        return [every[place % self._teams][place // self._teams] for place in range(total)]

    def agreed(self, value: Item) -> Item:
        """``value`` as the leader of this tensor-parallel group has it. Collective."""
        if self.mesh.tp_size == 1:
            return value
        shared: list[Any] = [value]
        first = dist.get_global_rank(self.mesh.tp_group, 0)
        dist.broadcast_object_list(shared, src=first, group=self.mesh.tp_group)
        return shared[0]

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all replicas. Collective."""
        sums = torch.tensor(list(numbers), dtype=torch.float64, device=self.mesh.device)
        return sum_over(sums, self.mesh.dp_group).tolist()

    def everywhere(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all ranks that sample. Collective, over those that lead as well as over all."""
        sums = torch.tensor(list(numbers), dtype=torch.float64, device=self.mesh.device)
        for group in (self.mesh.dp_group, self.mesh.cp_group, self.mesh.pp_group):
            sum_over(sums, group)
        return sums.tolist()

    def gathered(self, value: Item) -> list[Item]:
        """Every replica's value, in order. Collective."""
        if self.mesh.dp_size == 1:
            return [value]
        every: list[Any] = [None] * self.mesh.dp_size
        dist.all_gather_object(every, value, group=self.mesh.dp_group)
        return every
