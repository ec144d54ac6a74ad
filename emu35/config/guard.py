"""When a training step may not change the parameters."""

from collections.abc import Iterator
from dataclasses import dataclass

from emu35.config.check import at_least


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """A step whose loss or gradient norm is not finite is always skipped; after ``max_skipped``
    skipped steps in a row the run stops.

    ``grad_norm_factor`` and ``loss_factor`` (0: off) also skip a spike: a value above that many
    times the median of the last ``window`` accepted steps. Nothing is judged a spike before
    ``window`` steps were accepted, since the first steps of a run change fast by nature. Where a
    step makes several updates, ``window`` counts those.
    """

    max_skipped: int = 5
    grad_norm_factor: float = 0.0
    loss_factor: float = 0.0
    window: int = 128

    def problems(self) -> Iterator[str]:
        yield from at_least("guard", 1, max_skipped=self.max_skipped, window=self.window)
        for name, factor in (
            ("grad_norm_factor", self.grad_norm_factor),
            ("loss_factor", self.loss_factor),
        ):
            if factor != 0.0 and factor <= 1.0:
                yield (
                    f"guard.{name}={factor} would skip ordinary steps; use a number above 1, "
                    "or 0 to judge no spikes"
                )
