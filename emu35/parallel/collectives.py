"""Plain facts about this rank and the few collectives that emu35 itself calls.

Every function also works where torch.distributed was never initialised: there it behaves as a
world of one rank, so single-process tools and tests need no set-up.
"""

import math
from collections.abc import Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """Global rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the rank that writes shared files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def all_agree(value: bool) -> bool:
    """Whether ``value`` is true on every rank; the same answer everywhere."""
    return not any_rank(not value)


def any_rank(value: bool) -> bool:
    """Whether ``value`` is true on some rank; the same answer everywhere."""
    if world_size() == 1:
        return value
    flag = torch.tensor([int(value)], device=_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def worst_over_ranks(values: Sequence[float]) -> list[float]:
    """The largest of each number over all ranks; NaN counts as infinity, which no rank can miss."""
    worst = torch.tensor(
        [value if math.isfinite(value) else math.inf for value in values],
        dtype=torch.float64,
        device=_device(),
    )
    if world_size() > 1:
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.tolist()


def numbers_of_ranks(values: Sequence[float]) -> list[list[float]]:
    """As many numbers from every rank, in rank order; the same everywhere."""
    if world_size() == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.float64, device=_device())
    every = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(every, own)
    return [numbers.tolist() for numbers in every]


def objects_of_ranks(value: T) -> list[T]:
    """A picklable ``value`` from every rank, in rank order; the same everywhere."""
    if world_size() == 1:
        return [value]
    every: list[T | None] = [None] * world_size()
    dist.all_gather_object(every, value)
    return cast(list[T], every)


def sum_over(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum of ``values`` over ``group`` (None: only this rank), in place."""
    if group is not None and dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values


def _device() -> torch.device:
    backend = dist.get_backend() if dist.is_initialized() else "gloo"
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else _CPU


_CPU = torch.device("cpu")
