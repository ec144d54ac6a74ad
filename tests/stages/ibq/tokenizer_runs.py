"""Runs of the tokenizer stage that take a second: pictures, configuration, and what they left."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from emu35.config import (
    AdversarialConfig,
    CheckpointConfig,
    DistillationConfig,
    EntropyConfig,
    IBQConfig,
    IBQStageConfig,
    ImageDataConfig,
    LogConfig,
    OptimConfig,
    PerceptualConfig,
    PerceptualKind,
    RunConfig,
    TeacherKind,
    TokenizerConfig,
)
from emu35.stages.ibq import stage as ibq

STEPS = 6


def draw_pictures(folder: Path) -> Path:
    """Twelve pictures of four colours, 32 x 32 pixels, in ``folder``."""
    rng = np.random.default_rng(0)
    for index in range(12):
        values = rng.integers(0, 256, size=(2, 2, 3), dtype=np.uint8)
        image = Image.fromarray(values).resize((32, 32), Image.Resampling.NEAREST)
        image.save(folder / f"{index:02d}.png")
    return folder


def make_config(pictures: Path, **stage: object) -> RunConfig:
    return RunConfig(
        name="ibq_test",
        model=IBQConfig(
            ch=32,
            ch_mult=[1, 1, 1],
            num_res_blocks=1,
            attn_resolutions=[],
            resolution=32,
            z_channels=16,
            embed_dim=8,
            n_embed=64,
        ),
        tokenizer=TokenizerConfig(codebook_size=64),
        data=ImageDataConfig(
            paths=[str(pictures)],
            validation_paths=[str(pictures)],
            resolution=32,
            validation_images=5,
        ),
        stage=IBQStageConfig(
            **{  # type: ignore[arg-type]
                "steps": STEPS,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "validate_every": 0,
                "quantizer_warmup": 0.34,  # 2 of 6 steps
                **stage,
            }
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=1, weight_decay=0.01),
        checkpoint=CheckpointConfig(every=3, keep_last=4),
        log=LogConfig(every=1),
    )


def run_in(run_dir: Path, config: RunConfig):
    run_dir.mkdir(exist_ok=True)
    return ibq.run(config, run_dir=run_dir)


def rows_of(run_dir: Path) -> dict[int, dict[str, float]]:
    """Training rows of metrics.jsonl by step."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row for row in rows if "loss" in row}


START_STEP = 4
"""The generator feels the discriminator from here on, one step after that has begun to learn."""


def every_term() -> dict[str, Any]:
    """Fields of the stage that turn on every term, without a file to read."""
    return {
        "mse_weight": 0.5,
        "perceptual": PerceptualConfig(weight=0.3, kind=PerceptualKind.random_features),
        "adversarial": AdversarialConfig(
            weight=0.2,
            start_step=START_STEP,
            discriminator_start=START_STEP - 1,
            layers=2,
            ndf=8,
            lr=2e-3,
        ),
        "distillation": DistillationConfig(
            weight=0.4, kind=TeacherKind.random_features, layer=1, hidden=16
        ),
        "entropy": EntropyConfig(weight=0.05, temperature=0.5),
    }


def state_of(run_dir: Path, *, step: int) -> dict[str, Any]:
    """What the checkpoint of ``step`` holds."""
    return torch.load(run_dir / f"checkpoints/step_{step:08d}/ibq.pt", weights_only=True)


def tensors_of(state: Any, *, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor and number of a checkpoint by its path in it."""
    if isinstance(state, dict):
        parts = (tensors_of(part, prefix=f"{prefix}/{key}") for key, part in state.items())
        return {name: tensor for part in parts for name, tensor in part.items()}
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    return {prefix: torch.tensor(state)} if isinstance(state, int | float) else {}


def assert_equal(ours: Any, theirs: Any) -> None:
    """Bit for bit, and nothing missing."""
    first, second = tensors_of(ours), tensors_of(theirs)
    assert first.keys() == second.keys()
    for name, tensor in second.items():
        assert torch.equal(first[name], tensor), name


def copy_checkpoint(source: Path, *, step: int, to: Path) -> None:
    """Let a run in ``to`` begin after ``step`` of the one in ``source``."""
    name = f"step_{step:08d}"
    target = to / "checkpoints" / name
    target.mkdir(parents=True)
    for path in (source / "checkpoints" / name).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
