"""Who the decoder's features learn from: the interface, and a stand-in that needs no weights."""

from typing import Protocol

import torch

from emu35.vision.ibq.objective.random_features import WIDTHS, RandomFeatures


class FeatureTeacher(Protocol):
    """A frozen network from pixels ``[B, 3, H, W]`` in [-1, 1], of any H and W, to fp32 features
    ``[B, C, h, w]`` without a gradient. The grid spans the whole picture, whatever its aspect."""

    @property
    def channels(self) -> int:
        """C."""
        ...

    def __call__(self, pixels_B3HW: torch.Tensor) -> torch.Tensor: ...


class RandomTeacher:
    """The coarsest scale (an eighth of the picture a side) of an untrained network: for tests and
    demonstrations. It knows textures and nothing of what they mean."""

    channels = WIDTHS[-1]

    def __init__(self, *, seed: int, device: torch.device) -> None:
        self._features = RandomFeatures(seed=seed).to(device)

    @torch.no_grad()
    def __call__(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        return self._features(pixels_B3HW)[-1]
