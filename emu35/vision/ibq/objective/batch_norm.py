"""Batch normalisation over the pictures of all ranks, on any device.

``torch.nn.SyncBatchNorm`` does the same on GPUs alone; runs on CPUs with gloo would train another
discriminator than one process does. Parameters and buffers have the names of BatchNorm2d.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class CrossRankBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose batch is that of all ranks of ``group`` (None: this rank's own).

    Every rank must bring pictures of the same size, and as many. Statistics are fp32.
    """

    def __init__(self, channels: int, *, group: dist.ProcessGroup | None) -> None:
        super().__init__(channels)
        self.group = group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[B, C, H, W]`` to the same."""
        ranks = 1 if self.group is None else dist.get_world_size(self.group)
        if ranks == 1 or not self.training:
            return super().forward(input)
        x_BCHW = input.float()
        # In two passes: a mean of squares less a squared mean would cancel in fp32.
        mean_C = sum_over_ranks(x_BCHW.mean(dim=(0, 2, 3)) / ranks, group=self.group)
        centred_BCHW = x_BCHW - mean_C.view(1, -1, 1, 1)
        square_C = centred_BCHW.square().mean(dim=(0, 2, 3)) / ranks
        variance_C = sum_over_ranks(square_C, group=self.group)
        self._follow(mean_C, variance_C=variance_C, count=ranks * x_BCHW[:, 0].numel())
        scale_C = torch.rsqrt(variance_C + self.eps) * self.weight
        out_BCHW = centred_BCHW * scale_C.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return out_BCHW.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean_C: torch.Tensor, *, variance_C: torch.Tensor, count: int) -> None:
        """Move the running statistics, as BatchNorm2d does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(variance_C * count / max(count - 1, 1), self.momentum)


def sum_over_ranks(values: torch.Tensor, *, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum over ``group`` that gradients pass through: what one rank's sum is worth to the losses
    of all others comes back to it. Every rank must take the backward pass too."""
    return _SumOverRanks.apply(values, group)  # type: ignore[no-any-return]


class _SumOverRanks(torch.autograd.Function):
    """torch.distributed.nn.functional.all_reduce, which is deprecated, without a warning a call."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        total = values.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
