"""Small runs of reinforcement learning, and rewards of their own."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emu35.config import RunConfig
from emu35.config.io import read_config, write_config
from emu35.config.rules import find_problems
from emu35.config.schema import build, to_plain, with_defaults
from emu35.rewards.sample import Unscored
from emu35.stages.grpo import stage
from emu35.train.trainer import FitResult

PROMPTS = [{"prompt": f"a picture of {n}", "id": f"p{n}"} for n in range(7)]
calls = 0


def brightness(record: dict[str, Any], pictures: Sequence[np.ndarray]) -> float:
    """The mean level of all pictures, in [0, 1]."""
    del record
    return float(np.mean([picture.mean() for picture in pictures])) / 255


def undecided(record: dict[str, Any], pictures: Sequence[np.ndarray]) -> float | Unscored:
    """:func:`brightness` that has no opinion of one prompt."""
    return Unscored("no opinion") if record["id"] == "p3" else brightness(record, pictures)


def constant(record: dict[str, Any], pictures: Sequence[np.ndarray]) -> float:
    """Every answer is worth the same."""
    del record, pictures
    return 0.5


def terminating(record: dict[str, Any], pictures: Sequence[np.ndarray]) -> float:
    """:func:`brightness` that asks its process to stop at its 30th call."""
    global calls
    calls += 1
    if calls == 30:
        os.kill(os.getpid(), signal.SIGTERM)
    return brightness(record, pictures)


def dying(record: dict[str, Any], pictures: Sequence[np.ndarray]) -> float:
    """:func:`brightness` whose process dies without a word at its 40th call."""
    global calls
    calls += 1
    if calls == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return brightness(record, pictures)


def terminating_one_rank(record: dict[str, Any], pictures: Sequence[np.ndarray]) -> float:
    """:func:`brightness` that asks the second rank alone to stop at its 14th call."""
    global calls
    calls += 1
    if calls == 14 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return brightness(record, pictures)


def broken(record: dict[str, Any], pictures: Sequence[np.ndarray]) -> float:
    """A reward whose server is gone."""
    raise OSError("nobody answers")


def hardly(record: dict[str, Any], pictures: Sequence[np.ndarray]) -> float | Unscored:
    """:func:`constant` that has no opinion of one prompt."""
    return Unscored("no opinion") if record["id"] == "p3" else constant(record, pictures)


def write_prompts(path: Path, records: Sequence[dict[str, Any]] = PROMPTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def configure(
    folder: Path, *, start: Path, reward: str = "brightness", **changes: Any
) -> RunConfig:
    """Four steps of four prompts, three answers each; ``changes`` are sections to merge."""
    before = read_config(start)
    prompts = write_prompts(folder.parent / "prompts.jsonl")
    tree: dict[str, Any] = {
        "run_dir": str(folder),
        "seed": 7,
        "model": to_plain(before.model),
        "tokenizer": to_plain(before.tokenizer),
        "data": {
            "kind": "prompts",
            "sequence_length": 128,
            "tasks": {"draw": {"path": str(prompts), "size": "3x4", "rewards": {"light": 1.0}}},
        },
        "stage": {
            "kind": "grpo",
            "init_from": str(start),
            "steps": 4,
            "prompts_per_step": 4,
            "rollouts_per_prompt": 3,
            "validate_every": 0,
            "pages_every": 0,
            "rollout": {"save": True},
            "rewards": {"light": function_reward(reward)},
        },
        "optim": {"lr": 0.02, "min_lr": 0.02, "warmup_steps": 0},
        "checkpoint": {"every": 2},
        "log": {"every": 1},
    }
    misfits: dict[str, str] = {}
    config = build(with_defaults(_merged(tree, changes)), misfits=misfits)
    assert config is not None, misfits
    assert not list(find_problems(config))
    return config


def function_reward(name: str) -> dict[str, Any]:
    """The section of a reward of this module."""
    return {
        "kind": "function",
        "function": f"learning:{name}",
        "low": 0.0,
        "high": 1.0,
        "retries": 0,
        "timeout": 20.0,
    }


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def learn(config: RunConfig) -> FitResult:
    """Run in this process, or go on."""
    global calls
    calls = 0
    folder = Path(config.run_dir)
    folder.mkdir(exist_ok=True)
    write_config(config, folder)
    return stage.run(config, run_dir=folder)


def rows(folder: Path) -> dict[int, dict[str, Any]]:
    """The metrics of every step but times."""
    found: dict[int, dict[str, Any]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {
            key: value
            for key, value in row.items()
            if not key.startswith(("time/", "scoring/"))
            and key not in ("tflops", "memory_gib", "tokens_per_s", "data_starved")
        }
        found.setdefault(row["step"], {}).update(kept)
    return found
