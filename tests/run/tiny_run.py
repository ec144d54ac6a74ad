"""A tiny training for the launchers: its overrides, and what it recorded."""

import json
from pathlib import Path


def overrides(run_dir: Path, *, shards: Path, steps: int, batch: int = 4) -> list[str]:
    """A run of ``steps`` steps of a model with two layers; every step is in its metrics."""
    model = "num_layers=2 hidden_size=32 ffn_hidden_size=48 num_attention_heads=4 num_kv_heads=2"
    return [
        f"run_dir={run_dir}",
        *(f"model.{value}" for value in (*model.split(), "head_dim=16")),
        "model.max_position_embeddings=128",
        "data.sequence_length=128",
        f"data.sources.fruit.path={shards}",
        f"stage.steps={steps}",
        f"stage.global_batch_size={batch}",
        "stage.validate_every=0",
        "optim.lr=1e-2",
        "optim.warmup_steps=2",
        "checkpoint.every=0",
        "log.every=1",
        "launch.timeout=300",
        "launch.threads=1",
    ]


def rows(run_dir: Path) -> list[dict[str, float]]:
    """What a step computed, for every step: nothing that depends on the clock."""
    kept = ("step", "loss", "grad_norm", "lr", "tokens")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: row[key] for key in kept} for row in map(json.loads, lines) if "lr" in row]


def newest_step(run_dir: Path) -> int:
    """The newest step in the metrics, 0 before the first."""
    if not (run_dir / "metrics.jsonl").exists():
        return 0
    return max((int(row["step"]) for row in rows(run_dir)), default=0)
