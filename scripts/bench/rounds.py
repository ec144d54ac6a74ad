"""What every contest of training steps does: time a step with the device's queue empty, and refuse
to compare contestants that do not learn alike."""

import time
from collections.abc import Callable, Mapping

Step = Callable[[], float]
"""Makes one training step and returns the loss before it."""


def time_step(step: Step) -> tuple[float, float]:
    """Loss and seconds of one step, the device's queue empty at both ends."""
    synchronize()
    began = time.perf_counter()
    loss = step()
    synchronize()
    return loss, time.perf_counter() - began


def synchronize() -> None:
    """Wait for the device, where there is one to wait for."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_equal(losses: Mapping[str, float], *, when: str, tolerance: float) -> None:
    """Raises: SystemExit where the losses differ, or one is not a number."""
    first = next(iter(losses.values()))
    if not all(abs(loss - first) <= tolerance for loss in losses.values()):
        shown = ", ".join(f"{name} {value:.6f}" for name, value in losses.items())
        raise SystemExit(f"losses differ {when}: {shown}; the times would compare different work")
