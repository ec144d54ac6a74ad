"""Hooks of the layouts' worker: make a step bad or a rank slow, and note what every rank does."""

import math
import time
import zlib

import torch

from emu35.checkpoint.agree import gather
from emu35.config import LogConfig
from emu35.model.transformer import Emu35Model
from emu35.parallel.collectives import numbers_of_ranks, rank, world_size
from emu35.train.measure import Meter
from emu35.train.step import LMTask


def observe(task: LMTask, *, spec: dict) -> dict[str, list]:
    """Install what ``spec`` asks for; the result fills while ``task`` trains.

    ``bad`` maps a step to "gradient" or "loss": what is NaN there, on the last rank alone.
    ``slow_rank`` sleeps before each forward. Of every step: ``digests`` of all ranks' parameters,
    the guard's ``reasons`` on all ranks, and the ``rows`` and messages of the meter.
    """
    if "bad" not in spec and "slow_rank" not in spec:
        return {}
    if rank() == world_size() - 1:
        _spoil(task, bad=spec.get("bad", {}))
    if spec.get("slow_rank") == rank():
        task.chunks[0].register_forward_pre_hook(lambda *_: time.sleep(0.15))
    seen: dict[str, list] = {"digests": [], "reasons": [], "rows": []}
    make_step, meter = task.train_step, Meter(clock=task.clock, config=LogConfig())

    def train_step(step: int) -> dict[str, float]:
        task.clock.begin(step)
        metrics = make_step(step)
        seen["digests"].append(numbers_of_ranks([_digest(task.chunks)]))
        seen["reasons"].append(gather(task.guard.reason))
        meter.count(metrics)
        seen["rows"].append(meter.row())
        return metrics

    task.train_step = train_step  # type: ignore[method-assign]
    return seen


def _digest(chunks: list[Emu35Model]) -> int:
    """A checksum of every bit of this rank's parameters."""
    code = 0
    for chunk in chunks:
        for parameter in chunk.parameters():
            content = parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
            code = zlib.crc32(content, code)
    return code


def _spoil(task: LMTask, *, bad: dict[str, str]) -> None:
    def kind() -> str | None:
        return bad.get(str(task.clock.step))

    def spoil_gradient(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan if kind() == "gradient" else gradient

    def spoil_output(module: object, inputs: object, hidden: torch.Tensor) -> torch.Tensor | None:
        return hidden * math.nan if kind() == "loss" else None

    # The first weight of a layer is that of a norm, which tensor-parallel ranks hold alike.
    next(task.chunks[0].decoder.parameters()).register_hook(spoil_gradient)
    task.chunks[-1].register_forward_hook(spoil_output)
