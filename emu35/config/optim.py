"""AdamW and the learning-rate schedule."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from emu35.config.check import at_least


class Schedule(StrEnum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    constant = "constant"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW with decoupled weight decay; linear warm-up, then ``schedule`` down to ``min_lr``."""

    lr: float = 3e-4
    min_lr: float = 0.0
    warmup_steps: int = 100
    schedule: Schedule = Schedule.cosine
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0

    def problems(self) -> Iterator[str]:
        yield from at_least(
            "optim",
            0,
            lr=self.lr,
            min_lr=self.min_lr,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            clip_grad=self.clip_grad,
        )
        if self.min_lr > self.lr:
            yield f"optim.min_lr={self.min_lr} exceeds optim.lr={self.lr}; lower it"
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            yield f"optim.betas={list(self.betas)} must be two numbers in [0, 1)"
        if self.eps <= 0:
            yield f"optim.eps={self.eps} must be positive"
