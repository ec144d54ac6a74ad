"""Runs of stage=dida: what they learn and report, how they go on, and what others see of them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_pretrain import CODES, config_of, write_shards
from tiny_vision import write_tiny_ibq

from emu35.checkpoint.source import open_source
from emu35.config import (
    Adapter,
    DiDAConfig,
    EngineConfig,
    LoRAConfig,
    Overlong,
    ParallelConfig,
    PathConfig,
    PathKind,
    PretrainConfig,
    Recompute,
    RecomputeModule,
    RunConfig,
    SFTConfig,
)
from emu35.config.io import read_config, write_config
from emu35.config.rules import find_problems
from emu35.errors import ConfigError
from emu35.model.context import AttentionContext
from emu35.model.logits import vocabulary_logits
from emu35.model.lora import adapted_linears
from emu35.model.mask import AttentionMask
from emu35.model.transformer import Emu35Model
from emu35.stages import dida, pretrain
from emu35.stages.release import ExportOptions, export
from emu35.tokens.document import Image, Text

STEPS = 8
PICTURES = [
    Text("a picture"),
    Image(np.arange(6).reshape(2, 3)),
    Text("b"),
    Image(np.array([[9, 8]])),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image tokenizer, shards of pictures and of words, and a pretrained run."""
    place = tmp_path_factory.mktemp("dida")
    vision = write_tiny_ibq(place / "vision", codes=CODES)
    write_shards(place / "pictures", tokenizer=vision, parts=list(PICTURES))
    write_shards(place / "words", tokenizer=None, parts=[Text("nothing but words")])
    base = made(place, stage=PretrainConfig(steps=2, global_batch_size=2, micro_batch_size=2))
    write_config(base, start(place / "base"))
    pretrain.run(base, run_dir=place / "base")
    return place


def start(run_dir: Path) -> Path:
    run_dir.mkdir()
    return run_dir


def made(folder: Path, *, stage: Any) -> RunConfig:
    config = config_of(
        sources={"pictures": folder / "pictures"},
        validation={"seen": folder / "pictures", "words": folder / "words"},
        vision=folder / "vision",
    )
    config.stage = stage
    config.optim.lr = 1e-2
    config.checkpoint.every = 4
    config.log.every = 1
    return config


def adaptation(folder: Path, **values: Any) -> RunConfig:
    stage: dict[str, Any] = {
        "steps": STEPS,
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "noisy_length": 16,
        "responses_only": False,
        "init_from": str(folder / "base"),
    }
    return made(folder, stage=DiDAConfig(**(stage | values)))


def adapt(run_dir: Path, *, folder: Path, **values: Any) -> list[dict[str, Any]]:
    """Train; the rows of the log."""
    config = adaptation(folder, **values)
    write_config(config, start(run_dir))
    dida.run(config, run_dir=run_dir)
    return rows(run_dir)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


NOISY_ONLY = {"adapter": Adapter.lora_noisy_only, "lora": LoRAConfig(rank=4, alpha=8.0)}


@pytest.fixture(scope="module")
def adapted(folder: Path) -> Path:
    adapt(folder / "adapted", folder=folder, **NOISY_ONLY)
    return folder / "adapted"


def test_copies_are_learned_counted_and_validated_at_three_times(
    folder: Path, tmp_path: Path
) -> None:
    found = adapt(tmp_path / "run", folder=folder, steps=30, prompt_drop=0.0, noisy_length=10)
    trained = [row for row in found if "grad_norm" in row]
    assert trained[0]["loss_noisy"] > 3.5, "64 codes, nearly alike"
    # Two rows of a document each; the copy of its first picture leaves two columns.
    assert {row["pictures"] for row in trained} == {4.0}
    assert {row["pictures_copied"] for row in trained} == {2.0}
    (last,) = [row for row in found if "val/seen/loss" in row]
    names = {name for name in last if name.startswith("val/")}
    losses = [last[f"val/seen_t{time}/loss"] for time in (25, 50, 75)]
    assert losses[0] > losses[1] > losses[2], "the less noise, the easier"
    assert losses[-1] < 1.5
    assert names == {
        "val/seen/loss",
        "val/words/loss",
        *(f"val/seen_t{time}/loss" for time in (25, 50, 75)),
    }


@pytest.mark.parametrize("kind", list(PathKind))
def test_resuming_is_bitwise(kind: PathKind, folder: Path, tmp_path: Path) -> None:
    path = PathConfig(kind=kind)
    whole = adapt(tmp_path / "whole", folder=folder, path=path, prompt_drop=0.3)
    halves = shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(halves / "checkpoints" / f"step_{STEPS:08d}")
    dida.run(read_config(halves), run_dir=halves)

    def numbers(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = ("step", "loss", "loss_noisy", "loss_next_token", "grad_norm", "val/seen_t50/loss")
        return [{name: row[name] for name in kept if name in row} for row in found]

    assert numbers(rows(halves)) == numbers(whole)


@torch.no_grad()
def logits(model: Emu35Model) -> torch.Tensor:
    tokens_BS = (torch.arange(40) * 37 + 5)[None] % 300
    context = AttentionContext(
        positions_BS=torch.arange(40)[None],
        mask=AttentionMask.causal(torch.zeros_like(tokens_BS)),
    )
    return vocabulary_logits(model, hidden_NH=model(tokens_BS, context=context)[:, 0])


def silent(text: str) -> None:
    del text


def test_adapters_of_copies_change_no_next_token(folder: Path, adapted: Path) -> None:
    """Bit for bit, in the run as it is opened; and they are there for the copies."""
    base = open_source(folder / "base", message=silent).model
    opened = open_source(adapted, message=silent).model
    assert torch.equal(logits(opened), logits(base))
    adapters = [linear.adapter for linear in adapted_linears(opened).values()]
    assert len(adapters) == 4
    assert all(adapter is not None and adapter.noisy_only for adapter in adapters)
    assert all(adapter is not None and adapter.b.abs().max() > 0 for adapter in adapters)
    losses = [row["loss_noisy"] for row in rows(adapted) if "grad_norm" in row]
    assert losses[-1] < losses[0]


def test_its_release_is_that_of_the_base_and_says_so(
    folder: Path, adapted: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    for name, run in (("base", folder / "base"), ("adapted", adapted)):
        export(ExportOptions(run=run, out=tmp_path / name), message=said.append)
    assert any("the adapters lie beside them in dida_adapter" in text for text in said)
    assert json.loads((tmp_path / "adapted" / "dida_adapter" / "adapter.json").read_text()) == {
        "format": 1,
        "noisy_only": True,
        "rank": 4,
        "alpha": 8.0,
        "dropout": 0.0,
        "targets": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        "noise": {"kind": "metric", "c": 3.0, "alpha": 0.9},
    }
    (ours,) = (tmp_path / "adapted").glob("*.safetensors")
    (theirs,) = (tmp_path / "base").glob("*.safetensors")
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_that_starts_from_it_starts_from_the_base(
    folder: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = adapt(tmp_path / "a", folder=folder, steps=1, prompt_drop=0.0)
    second = adapt(tmp_path / "b", folder=folder, steps=1, prompt_drop=0.0, init_from=str(adapted))
    assert first[0]["loss"] == second[0]["loss"]
    assert "without its adapters of noisy copies" in capsys.readouterr().out
    release = export(ExportOptions(run=adapted, out=tmp_path / "release"), message=silent)
    third = adapt(tmp_path / "c", folder=folder, steps=1, prompt_drop=0.0, init_from=str(release))
    assert first[0]["loss"] == third[0]["loss"]
    assert "without its adapters of noisy copies" in capsys.readouterr().out


def problems(folder: Path, **values: Any) -> list[str]:
    return list(find_problems(adaptation(folder, **values)))


def test_what_cannot_be_is_refused_by_name(folder: Path) -> None:
    assert problems(folder) == []
    for values, words in (
        ({"noisy_weight": 0.0, "ar_weight": 0.0}, "both 0"),
        ({"prompt_drop": 1.0}, "stage.prompt_drop=1.0 must lie in [0, 1)"),
        ({"time_shift": 0.0}, "stage.time_shift=0.0 must be positive"),
        ({"path": PathConfig(alpha=-1.0)}, "stage.path.alpha=-1.0 must be positive"),
        ({"noisy_length": 0}, "stage.noisy_length=0"),
        ({"responses_only": True}, "data.overlong=cut"),
    ):
        (found,) = problems(folder, **values)
        assert words in found
    config = adaptation(folder, noisy_length=18)
    config.parallel = ParallelConfig(cp=2)
    assert any("stage.noisy_length=18 is not a multiple of 4" in p for p in find_problems(config))
    config = adaptation(folder, **NOISY_ONLY)
    config.engine = EngineConfig(
        recompute=Recompute.selective, recompute_modules=[RecomputeModule.mlp]
    )
    (found,) = find_problems(config)
    assert "leave mlp out" in found
    tuned = made(folder, stage=SFTConfig(init_from=str(folder / "base"), **NOISY_ONLY))
    tuned.data = replace(tuned.data, overlong=Overlong.drop)  # type: ignore[type-var]
    tuned.stage.micro_batch_size = tuned.stage.global_batch_size = 2
    (found,) = find_problems(tuned)
    assert "stage=sft has none of" in found


def test_a_metric_path_without_its_codebook_is_refused_before_training(
    folder: Path, tmp_path: Path
) -> None:
    config = adaptation(folder)
    config.tokenizer.vision = None
    with pytest.raises(ConfigError, match="names no image tokenizer"):
        dida.run(config, run_dir=start(tmp_path / "run"))
    assert list((tmp_path / "run").iterdir()) == []
