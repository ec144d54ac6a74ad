"""What a step trains on, read once for all tensor-parallel ranks of a replica.

Tensor-parallel ranks work on the same tokens. The first of them reads and lays out the batches, the
others receive them as they are: one read and one layout instead of ``tp``, which counts where the
shards lie in an object store or a row is widened by its stage. All of them plan, which costs
little and keeps the data position equal everywhere. Validation sets are small and seldom read;
every rank reads them for itself.
"""

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from emu35.data.batch import Batch
from emu35.data.loader import TokenLoader
from emu35.errors import DataError
from emu35.parallel.mesh import Mesh

_ALIGN = 8
"""Tensors begin at multiples of the widest element, so that views of the received bytes can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """How one batch lies in the bytes handed over: its tensors by name, in order."""

    sample_ids: list[int]
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]


class Feed:
    """The batches of a rank, step after step.

    Args:
        loader: of this rank's data-parallel index; with tensor parallelism, ranks other than the
            first may give one that does not read (``reads=False``).
    """

    def __init__(self, loader: TokenLoader, *, mesh: Mesh) -> None:
        self._loader, self._mesh = loader, mesh

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next global step, the same on all ranks of ``mesh.tp_group``.
        Collective within it.

        Raises:
            DataError: what the loader raises, on every rank of the group.
        """
        if self._mesh.tp_size == 1:
            return self._loader.next_step()
        # Whoever fails first still takes part, so that nobody waits for it.
        own, problem = list[Batch](), None
        try:
            own = self._loader.next_step()
        except DataError as error:
            problem = error
        if self._mesh.tp_rank == 0:
            self._hand_over(own, problem=problem)
        else:
            own = self._receive()
        if problem is not None:
            raise problem
        return own

    def _tell(self, note: list[_Layout] | str) -> list[_Layout] | str:
        """Rank 0's note on every rank of the group."""
        box = [note]
        dist.broadcast_object_list(
            box, src=self._source, group=self._mesh.tp_group, device=self._mesh.device
        )
        return box[0]

    @property
    def _source(self) -> int:
        return dist.get_global_rank(self._mesh.tp_group, 0)

    def _hand_over(self, batches: list[Batch], *, problem: DataError | None) -> None:
        if problem is not None:
            self._tell(str(problem))
            return
        layouts: list[_Layout] = []
        parts: list[torch.Tensor] = []
        for batch in batches:
            named = {field.name: getattr(batch, field.name) for field in fields(batch)}
            tensors = {key: item for key, item in named.items() if isinstance(item, torch.Tensor)}
            layouts.append(
                _Layout(
                    sample_ids=batch.sample_ids,
                    tensors=[(key, one.dtype, tuple(one.shape)) for key, one in tensors.items()],
                )
            )
            parts.extend(map(_bytes_of, tensors.values()))
        self._tell(layouts)
        self._broadcast(torch.cat(parts))

    def _receive(self) -> list[Batch]:
        note = self._tell([])
        if isinstance(note, str):
            raise DataError(note)
        sizes = [[_size(dtype, shape) for _, dtype, shape in item.tensors] for item in note]
        received = self._broadcast(torch.empty(sum(map(sum, sizes)), dtype=torch.uint8)).cpu()
        batches: list[Batch] = []
        place = 0
        for layout in note:
            tensors: dict[str, torch.Tensor] = {}
            for name, dtype, shape in layout.tensors:
                whole = received[place : place + _size(dtype, shape)]
                content = whole[: dtype.itemsize * torch.Size(shape).numel()]
                tensors[name] = content.view(dtype).reshape(shape)
                place += len(whole)
            batches.append(Batch(**tensors, sample_ids=layout.sample_ids))
        return batches

    def _broadcast(self, values: torch.Tensor) -> torch.Tensor:
        there = values.to(self._mesh.device)
        dist.broadcast(there, src=self._source, group=self._mesh.tp_group)
        return there


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    size = dtype.itemsize * torch.Size(shape).numel()
    return size + -size % _ALIGN


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -len(flat) % _ALIGN))
