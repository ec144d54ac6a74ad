"""Validation sets as the training step sees them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from emu35.config import LMStageConfig
from emu35.data.batch import BatchChange, as_it_is
from emu35.data.loader import ValidationSet
from emu35.errors import DataError
from emu35.parallel.collectives import sum_over
from emu35.parallel.mesh import Mesh
from emu35.train.objective import TokenWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """A validation set: its documents, what is done to them before the model sees them, the
    weights of their labels, and that it is evaluated at every ``every``-th validation. An
    ``optional`` one without labels is left out instead of refused."""

    documents: ValidationSet
    token_weights: TokenWeights
    every: int = 1
    finish: BatchChange = as_it_is
    optional: bool = False

    def has_turn(self, step: int, *, stage: LMStageConfig) -> bool:
        """Whether the validation after ``step`` includes it: the first one does, then every
        ``every``-th, the one before the first step, and the one after the last. The step decides,
        not a count of validations, so an interruption changes nothing."""
        if step in (0, stage.steps) or not stage.validate_every:
            return True
        return (step // stage.validate_every - 1) % self.every == 0


def with_labels(validation: Mapping[str, HeldOut], *, mesh: Mesh) -> dict[str, HeldOut]:
    """The sets that have labels that count, the same on all ranks. Collective.

    Raises:
        DataError: one that is not optional has none; said now and not when it is due.
    """
    kept: dict[str, HeldOut] = {}
    for name, held_out in validation.items():
        counts = any(
            bool((held_out.token_weights(batch) > 0).any()) for batch in held_out.documents
        )
        found = torch.tensor(float(counts), device=mesh.device)
        if sum_over(found, mesh.dp_group).item():
            kept[name] = held_out
        elif not held_out.optional:
            raise DataError(
                f"validation set {name!r} has no label that counts: its documents hold none of "
                f"data.validation.{name}.modality, or the stage counts responses only, as "
                "stage=sft does, and none of them opens a response; change the modality, or remove "
                f"the set with ~data.validation.{name}"
            )
    return kept
