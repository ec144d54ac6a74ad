"""Weights of LPIPS's names and shapes, drawn at random."""

import torch

from emu35.vision.lpips import CONVOLUTIONS, Backbone


def random_lpips(backbone: Backbone, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """All tensors, backbone and linear layers, under torchvision's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    taps = 0
    for layer in CONVOLUTIONS[backbone]:
        shape = (layer.outputs, layer.inputs, layer.kernel, layer.kernel)
        spread = (2 / (layer.inputs * layer.kernel**2)) ** 0.5
        tensors[f"features.{layer.number}.weight"] = (
            torch.randn(shape, generator=generator) * spread
        )
        tensors[f"features.{layer.number}.bias"] = (
            torch.randn(layer.outputs, generator=generator) * 0.1
        )
        if layer.tapped:
            head = torch.rand(1, layer.outputs, 1, 1, generator=generator) / layer.outputs
            tensors[f"lin{taps}.model.1.weight"] = head
            taps += 1
    return tensors
