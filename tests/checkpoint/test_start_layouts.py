"""A run that starts from Qwen3 starts from the same model in every layout, and that is Qwen3."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fruit import write_fruit
from start_worker import LAYOUTS, MODEL, TOKENS_S, start, text_logits
from tiny_qwen3 import TEXT_ROWS, TOKENIZER, make_qwen3, model_of
from torchrun_ranks import run_ranks

from emu35.cli import main
from emu35.config import (
    CheckpointConfig,
    OptimConfig,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    TokenDataConfig,
)
from emu35.config.data import SourceConfig
from emu35.config.io import write_config
from emu35.model.names import weights_by_name
from emu35.stages import pretrain
from emu35.stages.release import ExportOptions, export

WORKER = Path(__file__).parent / "start_worker.py"
NARROW = model_of(hidden=16, layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 in several shards, and what one process makes of it."""
    place = tmp_path_factory.mktemp("start")
    theirs = make_qwen3(place / "qwen3", model=MODEL, shard_size="30MB")
    assert len(list((place / "qwen3").glob("*.safetensors"))) > 2
    chunks, _ = start(place / "qwen3", parallel=ParallelConfig())
    with torch.no_grad():
        hf_logits = theirs(TOKENS_S[None]).logits[0, :, :TEXT_ROWS].clone()
    whole = {"parameters": weights_by_name(chunks[0]), "hf_logits": hf_logits}
    torch.save(whole, place / "whole.pt")
    return place


def test_one_process_gives_the_logits_of_transformers(folder: Path) -> None:
    chunks, _ = start(folder / "qwen3", parallel=ParallelConfig())
    ours = text_logits(chunks)
    theirs = torch.load(folder / "whole.pt", weights_only=True)["hf_logits"]
    assert ours is not None
    assert theirs.std() > 0.5, "logits near zero would be equal whatever was loaded"
    assert (ours - theirs).abs().max() < 1e-5


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, table: Path) -> Path:
    """Sentences under the released text table."""
    return write_fruit(tmp_path_factory.mktemp("sentences"), tokenizer=TOKENIZER)


def configure(
    run_dir: Path, *, shards: Path, init_from: Path, parallel: ParallelConfig | None = None
) -> RunConfig:
    config = RunConfig(
        run_dir=str(run_dir),
        model=NARROW,
        tokenizer=TOKENIZER,
        data=TokenDataConfig(sequence_length=64, sources={"fruit": SourceConfig(path=str(shards))}),
        stage=PretrainConfig(
            steps=2, global_batch_size=2, validate_every=0, init_from=str(init_from)
        ),
        parallel=parallel or ParallelConfig(),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        checkpoint=CheckpointConfig(every=1, keep_last=5),
    )
    run_dir.mkdir(parents=True)
    write_config(config, run_dir)
    return config


def rows(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if "grad_norm" in row]
    return [{key: row[key] for key in ("step", "loss", "grad_norm")} for row in found]


def prepare_runs(folder: Path, *, shards: Path) -> list[str]:
    """The names of runs of two ranks, configured in ``folder``; beside them ``alone``, trained in
    this process from an imported model."""
    make_qwen3(folder / "qwen3", model=NARROW, tied=True)
    words = f"convert import --from {folder}/qwen3 --out {folder}/imported --codebook-size 101"
    assert main(words.split()) == 0
    export(ExportOptions(run=folder / "imported", out=folder / "release"))

    alone = configure(folder / "alone", shards=shards, init_from=folder / "imported")
    pretrain.run(alone, run_dir=folder / "alone")
    origins: dict[str, Any] = {
        "tp2": {"init_from": folder / "qwen3", "parallel": ParallelConfig(tp=2, sp=True)},
        "dp2_from_release": {
            "init_from": folder / "release",
            "parallel": ParallelConfig(zero1=True),
        },
        "pp2": {"init_from": folder / "qwen3", "parallel": ParallelConfig(pp=2)},
    }
    for name, fields in origins.items():
        configure(folder / name, shards=shards, **fields)
    return list(origins)


@pytest.mark.multiproc
def test_two_ranks_hold_its_slices_and_train_what_one_trains(
    folder: Path, tmp_path: Path, shards: Path
) -> None:
    runs = prepare_runs(tmp_path, shards=shards)
    # The last one a second time, from its first step on, when Qwen3 is gone.
    words = ["tp2", "pp2-uneven", "pp2-vpp2", "--runs", str(tmp_path), *runs, "pp2+"]
    output = run_ranks([str(WORKER), str(folder), *words], ranks=2, timeout=280)
    assert output.count("312 rows drawn from the mean of the text rows + N(0, 0.02)") == 2, output
    assert not (tmp_path / "qwen3").exists()
    expected = rows(tmp_path / "alone")
    assert [row["step"] for row in expected] == [1, 2]
    assert expected[1]["loss"] < expected[0]["loss"]
    for name in runs:
        found = rows(tmp_path / name)
        assert len(found) == 2
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6), name
            # Two and a half million squares are added in fp32.
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.multiproc
def test_four_ranks_hold_its_slices(folder: Path) -> None:
    run_ranks([str(WORKER), str(folder), *LAYOUTS], ranks=4, timeout=280)


def test_tied_weights_become_two_matrices(tmp_path: Path) -> None:
    theirs = make_qwen3(tmp_path / "qwen3", model=MODEL, tied=True)
    chunks, _ = start(tmp_path / "qwen3", parallel=ParallelConfig())
    ours = text_logits(chunks)
    with torch.no_grad():
        hf_logits = theirs(TOKENS_S[None]).logits[0, :, :TEXT_ROWS]
    assert ours is not None
    assert (ours - hf_logits).abs().max() < 1e-5
    embedding, output = (
        weights_by_name(chunks[0])[name]
        for name in ("embedding.word_embeddings.weight", "output_layer.weight")
    )
    assert torch.equal(embedding[:TEXT_ROWS], output[:TEXT_ROWS])
    assert not torch.equal(embedding[TEXT_ROWS + 1 :], output[TEXT_ROWS + 1 :])
