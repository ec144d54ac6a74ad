"""Features of an untrained network: what stands in where no weights are at hand.

Random convolutions tell edges, colours and textures apart, at several scales, which is enough for a
demonstration and for tests. They are neither LPIPS nor semantics, and nothing that uses them says
so.
"""

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, relu

WIDTHS = (32, 64, 128, 128)
"""Channels of each scale; the first is the picture's own, each further one half of it a side."""

BIAS = 0.1
"""Standard deviation of the biases: without any, a grey area (pixels 0) would have no features."""


class RandomFeatures(nn.Module):
    """Convolutions 3 x 3 with ReLU, drawn from ``seed`` with variance 2 / fan-in; frozen, fp32,
    equal on every rank, and outside of any state dict."""

    def __init__(self, *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        inputs = 3
        for scale, outputs in enumerate(WIDTHS):
            spread = (2 / (9 * inputs)) ** 0.5
            weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * spread
            bias = torch.randn(outputs, generator=generator) * BIAS
            self.register_buffer(f"weight_{scale}", weight, persistent=False)
            self.register_buffer(f"bias_{scale}", bias, persistent=False)
            inputs = outputs

    def forward(self, pixels_B3HW: torch.Tensor) -> list[torch.Tensor]:
        """Pixels ``[B, 3, H, W]`` in [-1, 1] to one ``[B, C, H / 2^i, W / 2^i]`` a scale."""
        found: list[torch.Tensor] = []
        with torch.autocast(pixels_B3HW.device.type, enabled=False):
            x_BCHW = pixels_B3HW.float()
            for scale in range(len(WIDTHS)):
                if scale > 0:
                    x_BCHW = avg_pool2d(x_BCHW, 2, ceil_mode=True)
                weight, bias = (self.get_buffer(f"{part}_{scale}") for part in ("weight", "bias"))
                x_BCHW = relu(conv2d(x_BCHW, weight, bias, padding=1))
                found.append(x_BCHW)
        return found
