"""Sums and means over all ranks, which train one batch together."""

import torch
import torch.distributed as dist

from emu35.parallel.collectives import sum_over, world_size


def everyone() -> dist.ProcessGroup | None:
    """The group of all ranks; None for a single one."""
    return dist.group.WORLD if world_size() > 1 else None


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum, in place."""
    return sum_over(values, everyone())


def average_over_ranks(tensors: list[torch.Tensor], *, bucket_elements: int) -> None:
    """The mean of each, in place, through flat buckets of about that many elements."""
    bucket: list[torch.Tensor] = []
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        last = index == len(tensors) - 1
        if last or sum(part.numel() for part in bucket) >= bucket_elements:
            flat = sum_over_ranks(torch.cat([part.flatten() for part in bucket]))
            flat /= world_size()
            sizes = [part.numel() for part in bucket]
            for part, mean in zip(bucket, flat.split(sizes), strict=True):
                part.copy_(mean.view_as(part))
            bucket = []
