"""Discrete diffusion adaptation: how pictures are corrupted, and how much of it a row holds."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from emu35.config.check import at_least, fraction
from emu35.config.data import TokenDataConfig
from emu35.config.prompts import PromptDataConfig
from emu35.config.stage import LMStageConfig, StageConfig


class PathKind(StrEnum):
    """What stands where a code should be, at time t between noise (0) and the picture (1).

    ``metric``: any code, likelier the nearer it is in the codebook (arXiv 2510.24717).
    ``mixture_uniform``: the code with probability t, else any of the codebook alike.
    ``absorbing``: the code with probability t, else a mask.
    """

    metric = "metric"
    mixture_uniform = "mixture_uniform"
    absorbing = "absorbing"


class Sampler(StrEnum):
    """How a prediction becomes the next canvas (:mod:`emu35.dida.samplers`)."""

    kinetic_euler = "kinetic_euler"
    entropy_bound = "entropy_bound"
    maskgit = "maskgit"
    remdm = "remdm"


@dataclass(kw_only=True, slots=True)
class PathConfig:
    """The corruption. ``c`` and ``alpha`` shape the metric path, beta_t = c (t / (1 - t))^alpha,
    and want to be fitted to the codebook (``emu35 dida fit-path``); the others have no numbers."""

    kind: PathKind = PathKind.metric
    c: float = 3.0
    alpha: float = 0.9

    def problems(self) -> Iterator[str]:
        for name, value in (("c", self.c), ("alpha", self.alpha)):
            if not 0 < value < math.inf:
                yield f"stage.path.{name}={value} must be positive"


@dataclass(kw_only=True, slots=True)
class DiDAConfig(LMStageConfig):
    """Adaptation to parallel decoding (paper section 4.3): every picture has a noisy copy, whose
    codes are all predicted at once, beside the next-token loss on the clean documents.

    A row holds ``data.sequence_length`` clean tokens and behind them ``noisy_length`` for copies:
    of all pictures that fit, or of ``noisy_images`` of each document, drawn, at most.
    ``noisy_weight`` and ``ar_weight`` are the shares of the two losses, each a mean;
    ``loss_weights`` hold within the latter. Both learn responses alone, tokens and pictures, unless
    ``responses_only`` is off.

    ``time_shift`` s moves the drawn times towards noise (s > 1); with ``time_shift_codes`` n, a
    picture of m codes has s sqrt(m / n). ``prompt_drop`` is the share of documents whose prompt
    becomes the unconditional one, for guidance.
    """

    kind: str = "dida"
    path: PathConfig = field(default_factory=PathConfig)
    time_shift: float = 1.0
    time_shift_codes: int = 0
    noisy_length: int = 2048
    noisy_images: int = 0
    noisy_weight: float = 1.0
    ar_weight: float = 1.0
    responses_only: bool = True
    prompt_drop: float = 0.1

    def problems(self) -> Iterator[str]:
        # Zero-argument super() fails in slotted dataclasses (the class is rebuilt).
        yield from LMStageConfig.problems(self)
        yield from self.path.problems()
        yield from at_least("stage", 1, noisy_length=self.noisy_length)
        yield from at_least(
            "stage",
            0,
            noisy_images=self.noisy_images,
            noisy_weight=self.noisy_weight,
            ar_weight=self.ar_weight,
            time_shift_codes=self.time_shift_codes,
        )
        yield from fraction("stage", prompt_drop=self.prompt_drop)
        if not 0 < self.time_shift < math.inf:
            yield f"stage.time_shift={self.time_shift} must be positive"
        if self.noisy_weight == 0 and self.ar_weight == 0:
            yield "stage.noisy_weight and stage.ar_weight are both 0; give one of them a weight"


def row_length(stage: StageConfig, *, data: TokenDataConfig | PromptDataConfig) -> int:
    """Tokens of a row as the model sees it: with room for noisy copies where ``stage`` has any."""
    return data.sequence_length + (stage.noisy_length if isinstance(stage, DiDAConfig) else 0)
