"""A small real training task, importable and runnable: ``python tiny_task.py RUN_DIR [options]``.

A regression MLP with dropout and AdamW. A step draws from every random number generator that a
checkpoint has to carry, and its data come from a cursor, as with the real loader.
"""

import argparse
import copy
import errno
import math
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from emu35.checkpoint.staged import StagedWrite
from emu35.config import (
    CheckpointConfig,
    GuardConfig,
    LaunchConfig,
    LogConfig,
    PretrainConfig,
    RunConfig,
)
from emu35.errors import Emu35Error
from emu35.train.clock import Phase, StepClock
from emu35.train.guard import Guard
from emu35.train.trainer import fit


class TinyTask:
    def __init__(self, *, seed: int = 0, pause: float = 0.0, nan_at: tuple[int, ...] = ()) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.cursor = 0
        self.pause, self.nan_at = pause, nan_at
        self.guard, self.clock = Guard(GuardConfig(max_skipped=2)), StepClock()
        self.steps: list[int] = []
        self.validations = 0
        self.finished: str | None = None
        self.slow_validation, self.slow_save = 0.0, 0.0

    def train_step(self, step: int) -> dict[str, float]:
        time.sleep(self.pause)
        self.steps.append(step)
        x_BD = torch.randn(4, 8, generator=torch.Generator().manual_seed(self.cursor))
        self.cursor += 1
        noise = random.random() + float(np.random.rand())
        loss = (self.model(x_BD).squeeze(1) - x_BD.sum(1) - 0.01 * noise).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        value = math.nan if step in self.nan_at else loss.item()
        if self.guard.accepts(loss=value, grad_norm=norm.item()):
            with self.clock.marked(Phase.optimizer):
                self.optimizer.step()
        return {"loss": value, "lr": 1e-2, "grad_norm": norm.item(), "tokens": 32.0}

    def validate(self, step: int) -> dict[str, float]:
        self.validations += 1
        for _ in range(int(self.slow_validation / 0.5)):
            self.clock.beat()  # as a batch does
            time.sleep(0.5)
        # As greedy with the generators as a validation may be.
        torch.manual_seed(int(1000 * (np.random.rand() + random.random())))
        self.model.eval()
        with torch.no_grad():
            x_BD = torch.randn(16, 8)
            loss = (self.model(x_BD).squeeze(1) - x_BD.sum(1)).square().mean().item()
        self.model.train()
        return {"fit": loss}

    def start(self) -> None:
        return None

    def save(self, folder: Path) -> StagedWrite | None:
        torch.rand(1)  # saving must not disturb training either
        with open(os.devnull, "wb") as sink:
            for _ in range(int(self.slow_save / 0.5)):
                sink.write(bytes(2**20))
                sink.flush()
                time.sleep(0.5)
        if not dist.is_initialized() or dist.get_rank() == 0:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "cursor": self.cursor,
            }
            torch.save(state, folder / "task.pt")
        return None

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "task.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.cursor = state["cursor"]

    def parameters(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


class StagedTask(TinyTask):
    """Leaves its state to be written in the background, ``write_pause`` seconds a write;
    ``fail_at`` is the step whose state cannot be written."""

    def __init__(self, *, write_pause: float = 0.0, fail_at: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.write_pause, self.fail_at = write_pause, fail_at

    def save(self, folder: Path) -> "TinyWrite":
        return TinyWrite(self, folder=folder)


class TinyWrite:
    def __init__(self, task: StagedTask, *, folder: Path) -> None:
        self.task, self.folder = task, folder
        self.state: dict[str, Any] | None = None
        self.step = task.cursor
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def stage(self) -> None:
        self.state = copy.deepcopy(self._live())

    def write(self) -> list[str]:
        time.sleep(self.task.write_pause)
        if self.step == self.task.fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        name = "task.pt" if self.rank == 0 else f"task_{self.rank}.pt"
        torch.save(self._live() if self.state is None else self.state, self.folder / name)
        return [name]

    def finish(self) -> None:
        if self.rank == 0:
            (self.folder / "contents").write_text("complete")

    def _live(self) -> dict[str, Any]:
        return {
            "model": self.task.model.state_dict(),
            "optimizer": self.task.optimizer.state_dict(),
            "cursor": self.task.cursor,
        }


def fit_until(task: TinyTask, *, config: RunConfig, run_dir: Path, stop_at: int = 0) -> None:
    """Train in this process; ``stop_at`` sends it a SIGTERM during that step."""
    make_step = task.train_step

    def step(number: int) -> dict[str, float]:
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_step(number)

    task.train_step = step  # type: ignore[method-assign]
    fit(task, config=config, run_dir=run_dir)


def tiny_config(
    *,
    steps: int = 12,
    validate_every: int = 4,
    checkpoint_every: int = 5,
    timeout: int = 600,
    async_save: bool = False,
) -> RunConfig:
    return RunConfig(
        name="tiny",
        stage=PretrainConfig(steps=steps, validate_every=validate_every),
        checkpoint=CheckpointConfig(every=checkpoint_every, keep_last=2, async_save=async_save),
        log=LogConfig(every=1),
        launch=LaunchConfig(timeout=timeout),
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--checkpoint-every", type=int, default=5)
    parser.add_argument("--validate-every", type=int, default=4)
    parser.add_argument("--timeout", type=int, default=600)
    parser.add_argument("--hang-at", type=int, default=0)
    parser.add_argument("--hang-rank", type=int, default=0)
    parser.add_argument("--slow-validation", type=float, default=0.0)
    parser.add_argument("--slow-save", type=float, default=0.0)
    parser.add_argument("--write-pause", type=float, help="save in the background, this slowly")
    options = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    staged = options.write_pause is not None
    task = TinyTask(pause=options.pause)
    if staged:
        task = StagedTask(pause=options.pause, write_pause=options.write_pause)
    task.slow_validation, task.slow_save = options.slow_validation, options.slow_save
    if options.hang_at and options.hang_rank == int(os.environ.get("RANK", "0")):
        _hang_at(options.hang_at, task=task)
    try:
        fit(
            task,
            config=tiny_config(
                steps=options.steps,
                validate_every=options.validate_every,
                checkpoint_every=options.checkpoint_every,
                timeout=options.timeout,
                async_save=staged,
            ),
            run_dir=options.run_dir,
        )
    except Emu35Error as error:
        print(error, flush=True)
        return error.exit_code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    torch.save(task.parameters(), options.run_dir / "final.pt")
    return 0


def _hang_at(last: int, *, task: TinyTask) -> None:
    make_step = task.train_step

    def step(number: int) -> dict[str, float]:
        if number < last:
            return make_step(number)
        with task.clock.marked(Phase.data):
            return _hang()

    task.train_step = step  # type: ignore[method-assign]


def _hang() -> dict[str, float]:
    """Stuck in C code, where Python runs no signal handler: as in a collective without peers."""
    print("hanging", flush=True)
    import hashlib

    hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000_000)
    return {"loss": 0.0}


if __name__ == "__main__":
    sys.exit(main())
