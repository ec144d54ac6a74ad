"""Whether a step may change the parameters.

A step of reinforcement learning has several updates. Each is judged on its own
(:meth:`Guard.judge`), and the step is refused if all of them are (:meth:`Guard.conclude`).

A task asks between the gradient norm and the update. A step that is refused leaves parameters and
optimizer as they were; its data count as read, so the run goes on with the next step's. The task
hands in values that are equal on all ranks, hence all ranks decide alike, and the trainer keeps
the guard's state in the checkpoint, hence a resumed run decides as one that never stopped.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Any

from emu35.config import GuardConfig


class Guard:
    """Counts and explains what it refuses.

    Attributes:
        skipped: steps refused since the beginning of the run.
        in_a_row: how many of them were the latest steps.
        reason: why the latest step was refused, None if it was not.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self.skipped = 0
        self.in_a_row = 0
        self.reason: str | None = None
        self._losses: deque[float] = deque(maxlen=config.window)
        self._grad_norms: deque[float] = deque(maxlen=config.window)

    def accepts(self, *, loss: float, grad_norm: float) -> bool:
        """Judge one step, once: ``loss`` and ``grad_norm`` (before clipping) of the global batch,
        the same numbers on every rank."""
        self.conclude([self.judge(loss=loss, grad_norm=grad_norm)])
        return self.reason is None

    def judge(self, *, loss: float, grad_norm: float) -> str | None:
        """What speaks against one update of a step, None if it may be made. Nothing is counted
        before :meth:`conclude`."""
        problem = self._problem(loss=loss, grad_norm=grad_norm)
        if problem is None:
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)
        return problem

    def conclude(self, problems: Sequence[str | None]) -> None:
        """A step is over: what :meth:`judge` said of its updates. It is refused where all of them
        were; one without updates refuses nothing."""
        self.reason = None
        if problems and all(problems):
            self.refuse("; ".join(dict.fromkeys(filter(None, problems))))
        elif problems:
            self.in_a_row = 0

    def refuse(self, reason: str) -> None:
        """Count a step that something else than its numbers speaks against."""
        self.reason = reason
        self.skipped += 1
        self.in_a_row += 1

    def forget(self) -> None:
        """The objective is another one from here on, so that losses and gradient norms so far say
        nothing of what is usual; what was counted stays."""
        self._losses.clear()
        self._grad_norms.clear()

    @property
    def exhausted(self) -> bool:
        """Whether too many steps in a row were refused to go on."""
        return self.in_a_row >= self._config.max_skipped

    def state_dict(self) -> dict[str, Any]:
        """Strict JSON that restores every bit."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`; with a smaller ``window`` the newest values stay."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.reason = None
        self._losses = deque(state["losses"], maxlen=self._config.window)
        self._grad_norms = deque(state["grad_norms"], maxlen=self._config.window)

    def _problem(self, *, loss: float, grad_norm: float) -> str | None:
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"its {name} is not finite"
        config = self._config
        return _spike("loss", loss, factor=config.loss_factor, accepted=self._losses) or _spike(
            "gradient norm", grad_norm, factor=config.grad_norm_factor, accepted=self._grad_norms
        )


def _spike(name: str, value: float, *, factor: float, accepted: deque[float]) -> str | None:
    if factor == 0.0 or len(accepted) != accepted.maxlen:
        return None
    usual = median_low(accepted)
    # A median of zero, or below it as some objectives have, is no scale to measure with.
    if usual <= 0.0 or value <= factor * usual:
        return None
    return (
        f"its {name} {value:.4g} is {value / usual:.3g} times the median {usual:.4g} of the last "
        f"{len(accepted)} accepted steps"
    )
