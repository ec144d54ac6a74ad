"""LPIPS (arXiv 1801.03924) over AlexNet or VGG16, from weights on disk.

The published package needs torchvision, of which there is not a build for every torch; a backbone
is a few convolutions. Weights may have torchvision's names (``features.0.weight`` ...) or those of
the package's own state dict (``net.slice1.0.weight`` ...); the linear layers are ``lin0.model.1.``
``weight`` ..., as in the package's ``weights/v0.1``. AlexNet is the metric's usual backbone, VGG16
that of training objectives. Suffixes: B pictures, C channels, H W rows and columns.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import conv2d, max_pool2d, relu

from emu35.errors import ConfigError
from emu35.vision.weights import read_weights

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Of the red, green and blue of pixels in [-1, 1]."""

EPSILON = 1e-10
"""Added to the length of every place's vector before dividing by it."""

_PACKAGE_NAME = re.compile(r"net\.slice\d+\.(\d+)\.(weight|bias)")


class Backbone(StrEnum):
    """Which network's features are compared; the two distances are not comparable."""

    alexnet = "alexnet"
    vgg16 = "vgg16"


@dataclass(frozen=True, kw_only=True, slots=True)
class Convolution:
    """One convolution and its ReLU. ``number`` is its place in torchvision's ``features``; the
    largest of ``pool`` x ``pool`` places at every second place goes in (0: all places), and the
    result is compared where it is ``tapped``."""

    number: int
    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0
    tapped: bool = True


def _vgg16() -> tuple[Convolution, ...]:
    found: list[Convolution] = []
    inputs, number = 3, 0
    for block, (outputs, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for index in range(count):
            pool = 2 if block and not index else 0
            last = index == count - 1
            found.append(
                Convolution(number=number, inputs=inputs, outputs=outputs, pool=pool, tapped=last)
            )
            inputs = outputs
            number += 3 if last else 2  # the ReLU, and behind the block its pooling
    return tuple(found)


CONVOLUTIONS = {
    Backbone.alexnet: (
        Convolution(number=0, inputs=3, outputs=64, kernel=11, stride=4, padding=2),
        Convolution(number=3, inputs=64, outputs=192, kernel=5, padding=2, pool=3),
        Convolution(number=6, inputs=192, outputs=384, pool=3),
        Convolution(number=8, inputs=384, outputs=256),
        Convolution(number=10, inputs=256, outputs=256),
    ),
    Backbone.vgg16: _vgg16(),
}

SMALLEST = {Backbone.alexnet: 31, Backbone.vgg16: 16}
"""Pixels a side that all convolutions need."""


class Lpips(nn.Module):
    """Perceptual distance of pictures: 0 for equal ones, larger for what people see as different.

    Frozen and fp32 whatever autocast says: the weights are buffers outside of the state dict, so no
    optimizer and no checkpoint sees them. Several threads may ask at once.
    """

    def __init__(
        self, backbone: Backbone, *, tensors: Mapping[str, torch.Tensor], origin: str
    ) -> None:
        """``tensors`` are the backbone's and the linear layers', of the file or files ``origin``.

        Raises:
            ConfigError: one is missing or has another shape.
        """
        super().__init__()
        self.backbone = backbone
        self._layers = CONVOLUTIONS[backbone]
        named = {_torchvision_name(name): tensor for name, tensor in tensors.items()}
        taps = 0
        for layer in self._layers:
            name, size = f"features.{layer.number}", layer.kernel
            shape = (layer.outputs, layer.inputs, size, size)
            wanted = {f"{name}.weight": shape, f"{name}.bias": (layer.outputs,)}
            if layer.tapped:
                wanted[f"lin{taps}.model.1.weight"] = (1, layer.outputs, 1, 1)
                taps += 1
            for key, shape in wanted.items():
                tensor = _tensor(named, key, shape=shape, origin=origin, backbone=backbone)
                self.register_buffer(_buffer(key), tensor, persistent=False)
        for key, values in (("shift", SHIFT), ("scale", SCALE)):
            constant = torch.tensor(values).view(1, 3, 1, 1)
            self.register_buffer(key, constant, persistent=False)

    @torch.inference_mode()
    def distance(self, a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> torch.Tensor:
        """fp32 [B]: distances of RGB pictures with pixels in [-1, 1], at least :data:`SMALLEST` a
        side."""
        return self(a_BCHW, target_BCHW=b_BCHW)

    def forward(self, pixels_BCHW: torch.Tensor, *, target_BCHW: torch.Tensor) -> torch.Tensor:
        """fp32 [B], as :meth:`distance`, with a gradient for ``pixels_BCHW`` alone."""
        with torch.autocast(pixels_BCHW.device.type, enabled=False):
            with torch.no_grad():
                target = self._features(target_BCHW.float())
            own = self._features(pixels_BCHW.float())
            total_B = pixels_BCHW.new_zeros(len(pixels_BCHW), dtype=torch.float32)
            for tap, (a_BCHW, b_BCHW) in enumerate(zip(own, target, strict=True)):
                head = self.get_buffer(_buffer(f"lin{tap}.model.1.weight"))
                apart_BCHW = (_unit(a_BCHW) - _unit(b_BCHW)).square()
                total_B = total_B + conv2d(apart_BCHW, head).mean(dim=(1, 2, 3))
        return total_B

    def _features(self, pixels_BCHW: torch.Tensor) -> list[torch.Tensor]:
        x_BCHW = (pixels_BCHW - self.get_buffer("shift")) / self.get_buffer("scale")
        found: list[torch.Tensor] = []
        for layer in self._layers:
            if layer.pool:
                x_BCHW = max_pool2d(x_BCHW, kernel_size=layer.pool, stride=2)
            weight, bias = (
                self.get_buffer(_buffer(f"features.{layer.number}.{part}"))
                for part in ("weight", "bias")
            )
            x_BCHW = conv2d(x_BCHW, weight, bias, stride=layer.stride, padding=layer.padding)
            x_BCHW = relu(x_BCHW)
            if layer.tapped:
                found.append(x_BCHW)
        return found


def read_lpips(backbone: Backbone, *, weights: Path, heads: Path | None, owner: str) -> Lpips:
    """LPIPS from the file ``weights``, and ``heads`` where the linear layers lie in another one.

    Raises:
        ConfigError: a file is missing, or lacks a tensor of the right shape. The message begins
            with ``owner``.
    """
    tensors = dict(read_weights(weights, owner=owner))
    origin = f"{owner}: {weights}"
    if heads is not None:
        tensors |= read_weights(heads, owner=owner)
        origin += f" with {heads}"
    return Lpips(backbone, tensors=tensors, origin=origin)


def _unit(features_BCHW: torch.Tensor) -> torch.Tensor:
    """Every place's vector over its length."""
    length_B1HW = torch.linalg.vector_norm(features_BCHW, dim=1, keepdim=True)
    return features_BCHW / (length_B1HW + EPSILON)


def _torchvision_name(name: str) -> str:
    """The name in torchvision's backbone of a tensor of the package; other names as they are."""
    match = _PACKAGE_NAME.fullmatch(name)
    return f"features.{match[1]}.{match[2]}" if match else name


def _buffer(name: str) -> str:
    """Names of buffers have no dots."""
    return name.replace(".", "_")


def _tensor(
    tensors: Mapping[str, torch.Tensor],
    name: str,
    *,
    shape: tuple[int, ...],
    origin: str,
    backbone: Backbone,
) -> torch.Tensor:
    found = tensors.get(name)
    if found is None or tuple(found.shape) != shape:
        has = "is missing" if found is None else f"has shape {tuple(found.shape)}"
        raise ConfigError(
            f"{origin}: tensor {name} {has}; it must be {shape}, as LPIPS over {backbone} has it"
        )
    return found
