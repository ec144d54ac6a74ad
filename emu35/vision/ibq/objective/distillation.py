"""Semantic distillation: decoder features that predict a frozen teacher's (paper section 2.3).

As REPA (arXiv 2410.06940) does for diffusion transformers, a small MLP maps the student's features
to the teacher's, place by place, and their cosine is to be large. The MLP is trained with the
tokenizer and left behind afterwards.
"""

from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity

from emu35.config.model import IBQConfig
from emu35.config.tokenizer_objective import DistillationConfig, TeacherKind
from emu35.vision.ibq.blocks import decoder_channels
from emu35.vision.ibq.objective.teacher import FeatureTeacher, RandomTeacher
from emu35.vision.ibq.objective.vision_tower import VisionTower


class Distillation(nn.Module):
    """Teacher and projector. Parameters and state dict are the projector's alone.

    Attributes:
        layer: the stage of the decoder whose features are to be kept (``Reconstruction.features``).
    """

    def __init__(
        self, *, teacher: FeatureTeacher, layer: int, channels: int, hidden: int, seed: int
    ) -> None:
        """``channels`` are the decoder's at ``layer``; the projector is drawn from ``seed``."""
        super().__init__()
        self.layer = layer
        # In a list, so that a teacher which is a module does not become part of this one.
        self._teacher = [teacher]
        self.projector = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, teacher.channels),
        )
        _initialize(self.projector, seed=seed)

    def forward(self, features_BCHW: torch.Tensor, *, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Mean over pictures and places of the negative cosine, in [-1, 1]; fp32, unweighted.

        ``pixels_B3HW`` are the pictures themselves, not their reconstructions. The decoder's grid
        is averaged down to the teacher's; both span the whole picture.
        """
        target_BCHW = self._teacher[0](pixels_B3HW)
        rows, columns = target_BCHW.shape[-2:]
        pooled_BCHW = adaptive_avg_pool2d(features_BCHW.float(), (rows, columns))
        predicted = cast(torch.Tensor, self.projector(pooled_BCHW.permute(0, 2, 3, 1)))
        target = target_BCHW.permute(0, 2, 3, 1)
        return -cosine_similarity(predicted.float(), target, dim=-1).mean()


def build_distillation(
    config: DistillationConfig, *, model: IBQConfig, seed: int, device: torch.device
) -> Distillation | None:
    """What ``config`` asks for, for a tokenizer ``model``, on ``device``; None at weight 0.

    Raises:
        ConfigError: the teacher cannot be had.
    """
    if config.weight == 0:
        return None
    if config.kind is TeacherKind.random_features:
        teacher: FeatureTeacher = RandomTeacher(seed=config.seed, device=device)
    else:
        assert config.teacher is not None, "problems() asks for it"
        teacher = VisionTower(Path(config.teacher), device=device)
    return Distillation(
        teacher=teacher,
        layer=config.layer,
        channels=decoder_channels(model)[config.layer],
        hidden=config.hidden,
        seed=seed,
    ).to(device)


@torch.no_grad()
def _initialize(projector: nn.Sequential, *, seed: int) -> None:
    """Variance 2 / fan-in and biases 0, alike on every rank."""
    generator = torch.Generator().manual_seed(seed)
    for layer in projector:
        if isinstance(layer, nn.Linear):
            values = torch.empty(layer.weight.shape, dtype=torch.float32)
            spread = (2 / layer.in_features) ** 0.5
            layer.weight.copy_(values.normal_(0.0, spread, generator=generator))
            layer.bias.zero_()
