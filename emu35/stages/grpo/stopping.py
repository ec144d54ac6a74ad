"""Ending a run whose held-out reward no longer rises.

What is trained on rises as long as there is anything to exploit; a reward that nothing is trained
on does not. So the end is decided by validation: ``stage.evaluation.patience`` of them in a row
without a gain, and the trainer ends the run (:class:`~emu35.train.trainer.TrainTask`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from emu35.config.grpo import EvaluationConfig
from emu35.config.prompts import PromptTaskConfig
from emu35.errors import CheckpointError
from emu35.parallel.collectives import is_main

REWARD = "reward"
"""``SET/reward`` is the mean total of a validation set, ``SET/NAME`` that of reward NAME; both in
[1, 10], so that more is better whatever the reward's own range."""


@dataclass(kw_only=True, slots=True)
class _State:
    """``best`` was found at ``best_step``; since then ``waited`` validations, the last one at
    ``step``, found nothing better. ``watch`` is what they looked at."""

    watch: str
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    step: int = -1


class EarlyStop:
    """Waits for validations to get better. Fed the same numbers on every rank, it is the same on
    every rank.

    Args:
        config: its ``patience`` (0: never ends), ``min_gain`` and ``watch``.
        sets: the validation sets.
    """

    def __init__(self, config: EvaluationConfig, *, sets: Mapping[str, PromptTaskConfig]) -> None:
        self._patience, self._min_gain = config.patience, config.min_gain
        self._said = False
        self._keys = _keys(config.watch, sets=sets)
        self._state = _State(watch=", ".join(self._keys))

    @property
    def finished(self) -> str | None:
        """Why the run is to end, in words; None while it goes on."""
        state = self._state
        if not self._patience or state.waited < self._patience:
            return None
        return (
            f"{state.waited} validations without a gain of more than {self._min_gain:g} over the "
            f"best mean of {state.watch}, {state.best:.4g} at step {state.best_step} "
            f"(stage.evaluation.patience={self._patience})"
        )

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the validation metrics after ``step``.

        A validation that did not measure everything watched, because a reward could not score or
        a set had no turn, is no evidence and is not counted, which is said once; neither is a
        ``step`` seen before.
        """
        state = self._state
        values = [metrics.get(key, math.nan) for key in self._keys]
        if step <= state.step or not values:
            return
        if not all(map(math.isfinite, values)):
            self._say_unmeasured(step, values)
            return
        state.step = step
        value = math.fsum(values) / len(values)
        if state.best is None or value > state.best + self._min_gain:
            state.best, state.best_step, state.waited = value, step, 0
        else:
            state.waited += 1

    def _say_unmeasured(self, step: int, values: Sequence[float]) -> None:
        if self._said or not self._patience or not is_main():
            return
        self._said = True
        pairs = zip(self._keys, values, strict=True)
        missing = ", ".join(key for key, value in pairs if not math.isfinite(value))
        print(
            f"the validation after step {step} has no {missing}, which "
            f"stage.evaluation.patience={self._patience} watches: no answer could be "
            "scored. It does not count; if none does, nothing ends the run early",
            flush=True,
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            CheckpointError: it watched something else.
        """
        found = _State(**state)
        if found.watch != self._state.watch:
            raise CheckpointError(
                f"this run's early stopping watched {found.watch}, now it would watch "
                f"{self._state.watch}; its best value means nothing for that. Keep "
                "stage.evaluation.watch and the names of data.validation, or use another run_dir"
            )
        self._state = found


def _keys(watch: str | None, *, sets: Mapping[str, PromptTaskConfig]) -> list[str]:
    """The metrics whose mean is watched."""
    if watch is None:
        return [f"{name}/{REWARD}" for name, task in sets.items() if task.rewards]
    name, _, reward = watch.partition("/")
    return [f"{name}/{reward or REWARD}"]
