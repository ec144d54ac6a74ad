"""What the training loop itself remembers in a checkpoint."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from emu35.checkpoint.manager import Checkpoint
from emu35.log.jsonl import null_safe


@dataclass(kw_only=True, slots=True)
class Progress:
    """What the loop itself keeps in a checkpoint (the ``extra`` of its manifest).

    Attributes:
        step: optimizer steps made.
        tokens: tokens trained on, over all ranks.
        seconds: wall time of the training loop, over all interruptions.
        validated_step: the step of the newest validation, -1 before the first.
        validation: the newest value of every validation metric; those that had no turn at
            ``validated_step`` are from earlier ones.
        guard: what the guard remembers.
        ended: why training ended before ``stage.steps``; empty where it did not.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    validated_step: int = -1
    validation: dict[str, float] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    ended: str = ""

    @classmethod
    def of(cls, checkpoint: Checkpoint | None) -> "Progress":
        """The progress a checkpoint holds; a fresh one where there is none."""
        if checkpoint is None:
            return cls()
        progress = cls(**checkpoint.extra)
        progress.validation = {
            key: math.nan if value is None else value for key, value in progress.validation.items()
        }
        return progress

    def extra(self) -> dict[str, Any]:
        """Strict JSON: a validation loss without tokens is null rather than NaN."""
        return {**asdict(self), "validation": null_safe(self.validation)}

    def is_finished(self, *, total: int) -> bool:
        """Whether nothing is left to do: no step of ``total``, and no validation."""
        return (self.step >= total or bool(self.ended)) and self.validated_step == self.step
