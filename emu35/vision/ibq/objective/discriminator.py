"""The PatchGAN discriminator (pix2pix, arXiv 1611.07004, section 3.2.2)."""

from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from emu35.vision.ibq.objective.batch_norm import CrossRankBatchNorm

KERNEL = 4
SLOPE = 0.2
WIDEST = 8
"""Convolutions widen up to this multiple of the first one's channels."""

SPREAD = 0.02
"""Standard deviation of the first weights."""


class PatchDiscriminator(nn.Module):
    """Logits of overlapping patches: high where they look like real pictures.

    ``layers`` strided convolutions, one more without stride, and one that leaves a single channel;
    batch norm on all but the first and last. 3 layers see patches of 70 x 70 pixels. The modules
    have the order, and so the parameter names, of pix2pix (``main.0.weight`` ...). ``group`` are
    the ranks that share the statistics of batch norm (None: each has its own).
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        ndf: int = 64,
        layers: int = 3,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = [_conv(channels, ndf, stride=2, bias=True), _leaky()]
        width = ndf
        for layer in range(1, layers + 1):
            outputs = ndf * min(2**layer, WIDEST)
            parts += [
                _conv(width, outputs, stride=2 if layer < layers else 1, bias=False),
                CrossRankBatchNorm(outputs, group=group),
                _leaky(),
            ]
            width = outputs
        parts.append(_conv(width, 1, stride=1, bias=True))
        self.main = nn.Sequential(*parts)

    def forward(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Pixels ``[B, 3, H, W]`` in [-1, 1] to fp32 logits ``[B, 1, H', W']``."""
        # Reconstructions have the precision of the tokenizer, which need not be ours.
        return cast(torch.Tensor, self.main(pixels_B3HW.float())).float()


@torch.no_grad()
def initialize_discriminator(discriminator: PatchDiscriminator, *, seed: int) -> None:
    """Draw every weight from ``seed``, alike on every rank: N(0, 0.02) for convolutions, N(1, 0.02)
    for the scale of batch norm, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in discriminator.modules():
        if isinstance(module, nn.Conv2d | CrossRankBatchNorm):
            mean = 1.0 if isinstance(module, CrossRankBatchNorm) else 0.0
            values = torch.empty(module.weight.shape, dtype=torch.float32)
            module.weight.copy_(values.normal_(mean, SPREAD, generator=generator))
            if module.bias is not None:
                module.bias.zero_()


def _conv(inputs: int, outputs: int, *, stride: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, KERNEL, stride=stride, padding=1, bias=bias)


def _leaky() -> nn.LeakyReLU:
    return nn.LeakyReLU(SLOPE, inplace=True)
