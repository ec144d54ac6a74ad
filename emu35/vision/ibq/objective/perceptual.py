"""The perceptual term: LPIPS, or a distance of untrained features that is named as such.

A frozen network sees pictures and reconstructions; the gradient goes to the reconstructions alone.
"""

from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from emu35.config.tokenizer_objective import PerceptualConfig, PerceptualKind
from emu35.vision.ibq.objective.random_features import RandomFeatures
from emu35.vision.lpips import Backbone, read_lpips

FLOOR = 0.1
"""Added to a squared length before its root: a place with hardly any features then differs little
from another such, instead of by the direction of noise."""


class PerceptualDistance(Protocol):
    """A frozen distance, fp32 ``[B]``, differentiable in its first argument alone."""

    def __call__(self, pixels_BCHW: torch.Tensor, *, target_BCHW: torch.Tensor) -> torch.Tensor: ...


class RandomFeatureDistance(nn.Module):
    """Squared difference of unit feature vectors of an untrained network, its mean over places and
    scales: 0 for equal pictures, 2 at most. Not LPIPS, and not comparable with it."""

    def __init__(self, *, seed: int) -> None:
        super().__init__()
        self._features = RandomFeatures(seed=seed)

    def forward(self, pixels_BCHW: torch.Tensor, *, target_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self._features(target_BCHW)
        own = self._features(pixels_BCHW)
        scales = [
            (_unit(a_BCHW) - _unit(b_BCHW)).square().sum(dim=1).mean(dim=(1, 2))
            for a_BCHW, b_BCHW in zip(own, target, strict=True)
        ]
        return torch.stack(scales).mean(dim=0)


def build_perceptual(
    config: PerceptualConfig, *, device: torch.device
) -> PerceptualDistance | None:
    """The distance that ``config`` asks for, on ``device``; None at weight 0.

    Raises:
        ConfigError: the files do not hold LPIPS over VGG16.
    """
    if config.weight == 0:
        return None
    if config.kind is PerceptualKind.random_features:
        return RandomFeatureDistance(seed=config.seed).to(device)
    assert config.weights is not None, "problems() asks for it"
    return read_lpips(
        Backbone.vgg16,
        weights=Path(config.weights),
        heads=Path(config.heads) if config.heads else None,
        owner="stage.perceptual",
    ).to(device)


def _unit(features_BCHW: torch.Tensor) -> torch.Tensor:
    """Every place's vector over its length, or a little less."""
    return features_BCHW * torch.rsqrt(features_BCHW.square().sum(dim=1, keepdim=True) + FLOOR)
