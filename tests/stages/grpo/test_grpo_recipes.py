"""The paper's experiments of reinforcement learning, shrunk: their own tasks, rewards and loss on a
tiny model, tiny random models behind the rewards, and a judge that always says the same."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import learn, rows
from misbehaving import misbehaving, says
from onnx_models import write_embedder, write_yunet
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import write_clip

from emu35.config import PromptDataConfig, RunConfig
from emu35.config.io import read_config
from emu35.run.compose import compose

RECORDS: dict[str, list[dict[str, Any]]] = {
    "t2i": [{"prompt": "a cat"}],
    "x2i": [{"prompt": "make it red", "images": ["picture.png"], "region": [0, 0, 0.5, 0.5]}],
    "text_rendering": [
        {"prompt": "a sign", "text": "EXIT", "layout": [{"text": "EXIT", "box": [0, 0, 1, 1]}]}
    ],
    "people": [{"prompt": "the two of them", "images": ["picture.png"], "faces": 2}],
    "narrative": [{"prompt": "a fox learns to fish"}],
    "guidance": [{"prompt": "how to fold a crane"}],
    "exploration": [{"prompt": "walk through the old town"}],
    "manipulation": [{"prompt": "clear the table", "images": ["picture.png"]}],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the rewards load."""
    folder = tmp_path_factory.mktemp("models")
    clip = write_clip(folder / "clip")
    head = folder / "head.safetensors"
    save_file({"weight": torch.ones(1, 16), "bias": torch.ones(1)}, head)
    return {
        "clip": clip,
        "head": head,
        "embedder": write_embedder(folder / "embedder.onnx"),
        "detector": write_yunet(folder / "yunet.onnx"),
    }


def shrunk(
    name: str, folder: Path, *, start: Path, models: dict[str, Path], judge: str
) -> RunConfig:
    """Experiment ``name`` with everything of its own but sizes, places and the layout."""
    before = read_config(start)
    said = [
        f"experiment=emu35_34b/{name}",
        "model=tiny",
        "tokenizer=bytes",
        "parallel=single",
        "engine=default",
        "launch=local",
        "launch.nodes=1",
        "launch.nproc=1",
        "checkpoint=default",
        f"run_dir={folder}",
        f"tokenizer.codebook_size={before.tokenizer.codebook_size}",
        f"tokenizer.vision={before.tokenizer.vision}",
        f"stage.init_from={start}",
        "stage.steps=2",
        "stage.prompts_per_step=8",
        "stage.rollouts_per_prompt=2",
        "stage.precision=fp32",
        "stage.max_unscored=1.0",
        "stage.evaluation.max_prompts=1",
        f"stage.rewards.similarity.model={models['clip']}",
        "stage.rewards.similarity.device=cpu",
        f"stage.rewards.aesthetics.model={models['clip']}",
        f"stage.rewards.aesthetics.head={models['head']}",
        "stage.rewards.aesthetics.device=cpu",
        f"stage.rewards.alignment.base_url={judge}",
        "data.sequence_length=512",
        "log=console",
        "log.every=1",
    ]
    if name == "grpo_unified":
        said += [
            f"stage.rewards.consistency.base_url={judge}",
            f"stage.rewards.faces.detector={models['detector']}",
            f"stage.rewards.identity.detector={models['detector']}",
            f"stage.rewards.identity.embedder={models['embedder']}",
        ]
    said += [
        f"model.{field}={getattr(before.model, field)}"
        for field in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        )
    ]
    config = compose(said)
    assert isinstance(config.data, PromptDataConfig)
    folder.mkdir()
    Image.fromarray(np.full((8, 8, 3), 120, np.uint8)).save(folder / "picture.png")
    for kind, tasks in (("tasks", config.data.tasks), ("validation", config.data.validation)):
        for task, section in tasks.items():
            section.path = str(folder / f"{kind}_{task}.jsonl")
            section.size, section.image_area = "2x3", 24
            section.max_new_tokens = 120
            lines = [json.dumps(record) for record in RECORDS[task]]
            Path(section.path).write_text("\n".join(lines) + "\n")
    return config


@pytest.mark.parametrize(
    "name", ["grpo_image", pytest.param("grpo_unified", marks=pytest.mark.slow)]
)
def test_the_experiment_runs_two_steps(
    name: str, start: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    with misbehaving(says('{"score": 7}')) as server:
        folder = tmp_path / "run"
        config = shrunk(name, folder, start=start, models=models, judge=server.url)
        assert learn(config).step == 2
    found = rows(folder)
    assert sorted(found) == [1, 2]
    for row in found.values():
        assert math.isfinite(row["loss"])
        assert row["drift/largest"] < 1e-4
        assert row["updates"] == 1
        lacking = row["lacking/t2i"]
        assert row["reward/t2i/alignment"] == pytest.approx(7 * (1 - lacking) + lacking)
        assert "reward/t2i/aesthetics" in row
        assert row["unscored/x2i/alignment"] == 0
    assert "val/t2i/reward" in found[2]
    assert "val/t2i/aesthetics" in found[2]
    if name == "grpo_unified":
        assert found[1]["reward/text_rendering/ocr"] < 5
