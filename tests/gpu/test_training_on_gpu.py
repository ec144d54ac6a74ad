"""A training step on one GPU: the same loss as on the CPU, and memory as planned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emu35.planner.plan import make_plan
from emu35.run.compose import compose

pytestmark = pytest.mark.gpu

WORKER = Path(__file__).parents[1] / "train" / "layout_worker.py"


def train(result: Path, *, device: str, **spec: object) -> dict:
    environment = dict(os.environ)
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(WORKER), str(result), json.dumps(spec)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(result.read_text())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_losses_equal_those_of_the_cpu(precision: str, recompute: str, tmp_path: Path) -> None:
    oracle = train(tmp_path / "cpu.json", device="cpu")
    found = train(
        tmp_path / "gpu.json",
        device="cuda",
        precision=precision,
        engine={"recompute": recompute},
    )
    tolerance = 1e-3 if precision == "fp32" else 1e-2
    for ours, theirs in zip(found["metrics"], oracle["metrics"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)


@pytest.mark.parametrize("layers", ["local", "te"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_peak_memory_is_near_the_plan(layers: str, recompute: str) -> None:
    """Allocator peaks of one step of a model of 0.3B parameters."""
    if layers == "te":
        pytest.importorskip("transformer_engine")
    from step_memory import peak_of_one_step

    config = compose(
        [
            "model=tiny",
            "tokenizer=bytes",
            "model.num_layers=8",
            "model.hidden_size=1024",
            "model.ffn_hidden_size=4096",
            "model.num_attention_heads=16",
            "model.num_kv_heads=8",
            "model.head_dim=64",
            "model.max_position_embeddings=8192",
            "data.sequence_length=8192",
            "stage.global_batch_size=1",
            "stage.precision=bf16",
            f"engine.layers={layers}",
            f"engine.recompute={recompute}",
        ]
    )
    planned = make_plan(config)["memory_bytes_per_rank"]["total"]
    assert peak_of_one_step(config) == pytest.approx(planned, rel=0.35)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("direction", ["local-te", "te-local"])
def test_checkpoints_of_local_and_fused_layers_load_into_each_other(
    direction: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformer_engine")
    first, second = direction.split("-")
    common = {"device": "cuda", "precision": "bf16"}
    whole = train(tmp_path / "a.json", steps=4, engine={"layers": first}, **common)
    saved = str(tmp_path / "checkpoint")
    train(tmp_path / "b.json", steps=2, engine={"layers": first}, save=saved, **common)
    rest = train(tmp_path / "c.json", steps=2, engine={"layers": second}, load=saved, **common)
    for ours, theirs in zip(rest["metrics"], whole["metrics"][2:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_fp8_trains_close_to_bf16(recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a device with FP8")
    common = {"device": "cuda", "precision": "bf16"}
    oracle = train(tmp_path / "bf16.json", engine={"layers": "te"}, **common)
    engine = {"layers": "te", "fp8": "hybrid", "fp8_recipe": recipe}
    found = train(tmp_path / "fp8.json", engine=engine, **common)
    for ours, theirs in zip(found["metrics"], oracle["metrics"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=3e-2)
