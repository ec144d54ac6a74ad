"""LPIPS (arXiv 1801.03924), AlexNet variant, from weights on disk.

The published package needs torchvision, of which there is not a build for every torch; the network
is five convolutions. Names and shapes of weights are those of torchvision's AlexNet and of the
package's ``weights/v0.1/alex.pth``. Suffixes: B pictures, C channels, H W rows and columns.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn.functional import conv2d, max_pool2d, relu

from emu35.errors import ConfigError
from emu35.rewards.weights import read_weights

# Number within torchvision's features, output and input channels, kernel, stride, padding; and
# whether the largest of 3 x 3 at every second place goes in.
CONVOLUTIONS = (
    (0, 64, 3, 11, 4, 2, False),
    (3, 192, 64, 5, 1, 2, True),
    (6, 384, 192, 3, 1, 1, True),
    (8, 256, 384, 3, 1, 1, False),
    (10, 256, 256, 3, 1, 1, False),
)
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Of the red, green and blue of pixels in [-1, 1]."""

SMALLEST = 31
"""Pixels a side that all five convolutions need."""


class Lpips:
    """Perceptual distance of pictures: 0 for equal ones, larger for what people see as
    different. Several threads may ask at once."""

    def __init__(self, *, network: Path, heads: Path, reward: str) -> None:
        """
        Raises:
            ConfigError: a file is missing, or lacks a tensor of the right shape.
        """
        weights, lines = read_weights(network, reward=reward), read_weights(heads, reward=reward)
        self._convolutions: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._heads: list[torch.Tensor] = []
        for index, (number, out, into, kernel, *_) in enumerate(CONVOLUTIONS):
            name, shape = f"features.{number}", (out, into, kernel, kernel)
            weight = _tensor(weights, f"{name}.weight", shape=shape, path=network)
            bias = _tensor(weights, f"{name}.bias", shape=(out,), path=network)
            self._convolutions.append((weight, bias))
            head = _tensor(lines, f"lin{index}.model.1.weight", shape=(1, out, 1, 1), path=heads)
            self._heads.append(head)

    @torch.inference_mode()
    def distance(self, a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> torch.Tensor:
        """fp32 [B]: distances of RGB pictures with pixels in [-1, 1], at least 31 a side."""
        total_B = torch.zeros(len(a_BCHW))
        layers = zip(self._features(a_BCHW), self._features(b_BCHW), self._heads, strict=True)
        for a, b, head in layers:
            total_B += conv2d((_unit(a) - _unit(b)).square(), head).mean(dim=(1, 2, 3))
        return total_B

    def _features(self, pixels_BCHW: torch.Tensor) -> list[torch.Tensor]:
        shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
        x_BCHW = (pixels_BCHW - shift) / scale
        found: list[torch.Tensor] = []
        for shape, (weight, bias) in zip(CONVOLUTIONS, self._convolutions, strict=True):
            *_, stride, padding, pooled = shape
            if pooled:
                x_BCHW = max_pool2d(x_BCHW, kernel_size=3, stride=2)
            x_BCHW = relu(conv2d(x_BCHW, weight, bias, stride=stride, padding=padding))
            found.append(x_BCHW)
        return found


def _unit(features_BCHW: torch.Tensor) -> torch.Tensor:
    """Every place's vector over its length."""
    return features_BCHW / (features_BCHW.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _tensor(
    weights: Mapping[str, torch.Tensor], name: str, *, shape: tuple[int, ...], path: Path
) -> torch.Tensor:
    found = weights.get(name)
    if found is None or tuple(found.shape) != shape:
        has = "is missing" if found is None else f"has shape {tuple(found.shape)}"
        raise ConfigError(
            f"LPIPS: tensor {name} of {path} {has}; it must be {shape}, as in torchvision's "
            "AlexNet and lpips/weights/v0.1/alex.pth"
        )
    return found
