"""A small real training task, importable and runnable: ``python tiny_task.py RUN_DIR [options]``.

A regression MLP with dropout and AdamW. A step draws from every random number generator that a
checkpoint has to carry, and its data come from a cursor, as with the real loader.
"""

import argparse
import math
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

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

    def validate(self) -> dict[str, float]:
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

    def save(self, folder: Path) -> None:
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

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "task.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.cursor = state["cursor"]

    def parameters(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def tiny_config(
    *, steps: int = 12, validate_every: int = 4, checkpoint_every: int = 5, timeout: int = 600
) -> RunConfig:
    return RunConfig(
        name="tiny",
        stage=PretrainConfig(steps=steps, validate_every=validate_every),
        checkpoint=CheckpointConfig(every=checkpoint_every, keep_last=2),
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
    options = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    task = TinyTask(pause=options.pause)
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
