"""How long training stands still for a checkpoint, saved at once and in the background.

A real model and optimizer of the given size train a few steps, save, and train on. Blocked is the
time in which no step is made: all of a synchronous save; of one in the background its copy at the
beginning and its completion at the end. Ends with one JSON line.

    python scripts/bench/checkpoint.py [--hidden 512] [--layers 8] [--repeats 3] [--folder DIR]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from emu35.checkpoint import sharded
from emu35.checkpoint.manager import CheckpointManager
from emu35.checkpoint.staged import StateWrite
from emu35.config import (
    CheckpointConfig,
    EngineConfig,
    LMConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
)
from emu35.model.build import build_chunks
from emu35.model.init import initialize
from emu35.parallel.mesh import init_mesh, leave
from emu35.train.optim import wrap_and_optimize

VOCABULARY = 8192


class Trainer:
    """Parameters, moments, and a step that changes all of them."""

    def __init__(self, *, hidden: int, layers: int) -> None:
        parallel, precision = ParallelConfig(), Precision.bf16
        init_mesh(parallel, seed=1)
        model = LMConfig(
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=4 * hidden,
            num_attention_heads=8,
            num_kv_heads=2,
            head_dim=hidden // 8,
            max_position_embeddings=1024,
        )
        self.chunks = build_chunks(
            model, vocabulary_size=VOCABULARY, parallel=parallel, precision=precision
        )
        for chunk in self.chunks:
            initialize(chunk, seed=1, pad_id=0)
        self.wrapped, self.optimizer = wrap_and_optimize(
            self.chunks,
            optim=OptimConfig(),
            parallel=parallel,
            engine=EngineConfig(),
            precision=precision,
        )

    @property
    def parameters(self) -> int:
        return sum(p.numel() for chunk in self.chunks for p in chunk.parameters())

    def step(self) -> None:
        for chunk in self.wrapped:
            for parameter in chunk.parameters():
                parameter.main_grad.fill_(1e-3)  # type: ignore[union-attr]
        self.optimizer.step()


def measure(trainer: Trainer, manager: CheckpointManager, *, step: int) -> dict[str, float]:
    """Seconds blocked and seconds a step takes, beside the background's writing and without."""

    def write(folder: Path) -> StateWrite:
        return sharded.plan_save(folder, chunks=trainer.chunks, optimizer=trainer.optimizer)

    began = time.perf_counter()
    manager.save(step, write=write, extra={})
    blocked_sync = time.perf_counter() - began
    alone = timed_steps(trainer, enough=lambda: True)

    began = time.perf_counter()
    manager.begin(step + 1, write=write, extra={})
    copied = time.perf_counter() - began
    beside = timed_steps(trainer, enough=manager.is_written)
    in_flight = time.perf_counter() - began
    began = time.perf_counter()
    manager.finish()
    completed = time.perf_counter() - began
    return {
        "blocked_sync_s": blocked_sync,
        "blocked_async_s": copied + completed,
        "copy_s": copied,
        "complete_s": completed,
        "in_flight_s": in_flight,
        "step_s": alone,
        "step_beside_write_s": beside,
    }


def timed_steps(trainer: Trainer, *, enough: Callable[[], bool]) -> float:
    """Median seconds of a step, over at least three."""
    seconds: list[float] = []
    while len(seconds) < 3 or not enough():
        began = time.perf_counter()
        trainer.step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer = Trainer(hidden=options.hidden, layers=options.layers)
    trainer.step()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        manager = CheckpointManager(
            root=Path(folder) / "checkpoints",
            config=CheckpointConfig(keep_last=1),
            identity={},
            message=lambda text: None,
        )
        found = [measure(trainer, manager, step=10 * i) for i in range(1, options.repeats + 1)]
        checkpoint = manager.latest()
        assert checkpoint is not None
        size = sum(path.stat().st_size for path in checkpoint.path.rglob("*") if path.is_file())
    result = {name: statistics.median(row[name] for row in found) for name in found[0]}
    result["blocked_ratio"] = result["blocked_async_s"] / result["blocked_sync_s"]
    leave()
    print(
        json.dumps(
            {"parameters": trainer.parameters, "bytes": size}
            | {name: round(value, 4) for name, value in result.items()}
        )
    )


if __name__ == "__main__":
    main()
