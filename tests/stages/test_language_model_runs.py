"""Whole runs of the language-model stages, from text on disk to checkpoints, in this process."""

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_lm
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from emu35.checkpoint.staged import StateWrite
from emu35.config import (
    CheckpointConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    SFTConfig,
    TokenDataConfig,
)
from emu35.config.data import Overlong, Packing, SourceConfig, ValidationConfig
from emu35.config.io import write_config
from emu35.errors import CheckpointError, DataError
from emu35.log.jsonl import read_rows
from emu35.model import mcore_config
from emu35.run import worker
from emu35.run.preflight import check_inputs
from emu35.stages import pretrain, sft
from emu35.tokens.vocabulary import vocabulary_of

STEPS, STOP = 6, 3


@pytest.fixture(scope="module")
def shards(fruit_shards: Path) -> Path:
    return fruit_shards


def config(run_dir: Path, *, shards: Path, stage: Any = None, **model: Any) -> RunConfig:
    config = RunConfig(
        run_dir=str(run_dir),
        model=tiny_lm(max_position_embeddings=128, **model),
        data=TokenDataConfig(
            sequence_length=128, sources={"fruit": SourceConfig(path=str(shards))}
        ),
        stage=stage or PretrainConfig(steps=STEPS, global_batch_size=4, validate_every=0),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        checkpoint=CheckpointConfig(every=STOP, keep_last=5),
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config, run_dir)
    return config


def train(run_dir: Path, **options: Any) -> None:
    pretrain.run(config(run_dir, **options), run_dir=run_dir)


def state(run_dir: Path, *, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, fp32 copies, moments."""
    reader = FileSystemReader(run_dir / "checkpoints" / f"step_{step:08d}" / "state")
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp_load(found, storage_reader=reader)
    return found


def rows(run_dir: Path) -> list[dict[str, float]]:
    kept = ("step", "loss", "loss_text", "grad_norm", "lr", "tokens")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in row.items() if key in kept or key.startswith("data/")}
        for row in map(json.loads, lines)
    ]


def test_resume_with_dropout_is_bitwise(tmp_path: Path, shards: Path) -> None:
    options: dict[str, Any] = {"shards": shards, "hidden_dropout": 0.2, "attention_dropout": 0.1}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(whole, **options)
    train(halves, **options)
    for step in range(STOP + 1, STEPS + 1):
        shutil.rmtree(halves / "checkpoints" / f"step_{step:08d}", ignore_errors=True)
    train(halves, **options)

    assert rows(halves) == rows(whole)
    ours, theirs = state(halves, step=STEPS), state(whole, step=STEPS)
    assert len(ours) > 20
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    cursors = [
        (folder / "checkpoints" / f"step_{STEPS:08d}" / "loader.json").read_text()
        for folder in (halves, whole)
    ]
    assert cursors[0] == cursors[1]

    # And dropout does something: without it the same steps have other losses.
    plain = tmp_path / "plain"
    train(plain, shards=shards)
    assert rows(plain)[0]["loss"] != rows(whole)[0]["loss"]


def test_the_embedding_of_padding_stays_zero(tmp_path: Path, shards: Path) -> None:
    made = config(tmp_path, shards=shards)
    made.optim.weight_decay = 0.5
    made.log.every = 1
    pretrain.run(made, run_dir=tmp_path)
    assert all(row["tokens"] < 4 * 128 for row in rows(tmp_path)), "every step saw padding"
    embedding_VH = state(tmp_path, step=STEPS)["embedding.word_embeddings.weight"]
    pad = vocabulary_of(made.tokenizer).pad
    assert not embedding_VH[pad].any()
    assert embedding_VH[:pad].any(dim=1).all()


def test_a_state_written_in_the_background_is_that_of_its_step(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step STOP is held back until every later step but the last was made."""
    written_at: list[int] = []
    write = StateWrite.write

    def write_late(self: StateWrite) -> list[str]:
        if threading.current_thread() is not threading.main_thread():
            limit = time.monotonic() + 60
            while rows(tmp_path / "async")[-1]["step"] < STEPS - 1 and time.monotonic() < limit:
                time.sleep(0.01)
            written_at.append(int(rows(tmp_path / "async")[-1]["step"]))
        return write(self)

    monkeypatch.setattr(StateWrite, "write", write_late)
    for name in ("async", "sync"):
        made = config(tmp_path / name, shards=shards)
        made.checkpoint.async_save = name == "async"
        made.log.every = 1
        pretrain.run(made, run_dir=tmp_path / name)
    assert written_at == [STEPS - 1]
    for step in (STOP, STEPS):
        ours, theirs = (state(tmp_path / name, step=step) for name in ("async", "sync"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    names = [
        sorted(path.name for path in (tmp_path / name / "checkpoints").rglob("*"))
        for name in ("async", "sync")
    ]
    assert names[0] == names[1]
    assert rows(tmp_path / "async") == rows(tmp_path / "sync")


def test_a_run_from_another_starts_with_its_weights_and_outlives_it(
    tmp_path: Path, shards: Path
) -> None:
    parent, child = tmp_path / "parent", tmp_path / "child"
    train(parent, shards=shards)
    stage = PretrainConfig(
        steps=STEPS, global_batch_size=4, validate_every=0, init_from=str(parent)
    )
    child_config = config(child, shards=shards, stage=stage)
    pretrain.run(child_config, run_dir=child)
    assert rows(child)[0]["loss"] < rows(parent)[0]["loss"] - 0.5
    before = rows(child)

    shutil.rmtree(child / "checkpoints" / f"step_{STEPS:08d}")
    parent.rename(tmp_path / "moved")
    check_inputs(child_config)
    pretrain.run(child_config, run_dir=child)
    assert rows(child) == before

    fresh = config(tmp_path / "fresh", shards=shards, stage=stage)
    with pytest.raises(CheckpointError, match="parent"):
        pretrain.run(fresh, run_dir=tmp_path / "fresh")


def test_deterministic_runs_are_equal_and_torch_and_the_model_know_it(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in worker.DETERMINISTIC_ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # and put back afterwards, whatever the run sets
    built: list[bool] = []
    build = mcore_config.TransformerConfig

    def record(**values: Any) -> Any:
        built.append(values["deterministic_mode"])
        return build(**values)

    monkeypatch.setattr(mcore_config, "TransformerConfig", record)
    try:
        for name in ("one", "other"):
            run_config = config(tmp_path / name, shards=shards, hidden_dropout=0.2)
            run_config.deterministic = True
            worker.run_stage(run_config, run_dir=tmp_path / name)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert built == [True, True]
    one, other = (state(tmp_path / name, step=STEPS) for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert rows(tmp_path / "one") == rows(tmp_path / "other")


def test_fine_tuning_on_documents_without_responses_is_refused(
    tmp_path: Path, shards: Path
) -> None:
    stage = SFTConfig(steps=STEPS, global_batch_size=4, validate_every=0)
    with pytest.raises(DataError, match=r"no token of step 1 has a loss weight.*response"):
        sft.run(config(tmp_path, shards=shards, stage=stage), run_dir=tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_source_ends_within_a_run_and_its_end_is_told_once(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(folder: Path) -> str:
        made = config(folder, shards=shards)
        made.log.every = 1
        made.data = TokenDataConfig(
            sequence_length=128,
            open_bins=2,
            sources={
                "apples": SourceConfig(path=str(shards), ratio=2.0, epochs=0.4),
                "pears": SourceConfig(path=str(shards), schedule={2: 0.5}),
            },
        )
        pretrain.run(made, run_dir=folder)
        return capsys.readouterr().out

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    out = run(whole)
    (found,) = re.findall(r"source 'apples' ended after 0\.4 epochs .*before sample (\d+)", out)
    told = rows(whole)
    assert told[0]["data/documents/apples"] < 16 == told[-1]["data/documents/apples"]

    run(halves)
    for step in range(STOP + 1, STEPS + 1):
        shutil.rmtree(halves / "checkpoints" / f"step_{step:08d}", ignore_errors=True)
    # The steps that are made again tell again what is of them, and only that.
    assert ("source 'apples' ended" in run(halves)) == (int(found) >= STOP * 4)
    assert rows(halves) == told


def test_a_run_reports_its_sources_thins_out_validation_and_draws_curves(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = PretrainConfig(steps=STEPS, global_batch_size=4, validate_every=1)
    run_config = config(tmp_path, shards=shards, stage=stage)
    run_config.log.every = 1
    run_config.data = TokenDataConfig(
        sequence_length=128,
        sources={name: SourceConfig(path=str(shards)) for name in ("apples", "pears")},
        validation={
            "often": ValidationConfig(path=str(shards), max_documents=4),
            "seldom": ValidationConfig(path=str(shards), max_documents=4, every=3),
        },
        packing=Packing.offline,
        overlong=Overlong.drop,
    )
    result = pretrain.run(run_config, run_dir=tmp_path)

    found = read_rows(tmp_path / "metrics.jsonl")
    for row in [row for row in found if "loss" in row]:
        parts = [(row[f"share/{name}"], row[f"loss/{name}"]) for name in ("apples", "pears")]
        assert sum(share * loss for share, loss in parts) == pytest.approx(row["loss"], rel=1e-5)
        assert sum(share for share, _ in parts) == pytest.approx(1.0, rel=1e-5)
    steps = [row for row in found if "loss" in row]
    for row in steps:
        both = [row[f"data/tokens/{name}"] for name in ("apples", "pears")]
        assert sum(both) == row["tokens_total"]
        assert row["data/fill"] == pytest.approx(row["tokens"] / (128 * 4))
        one, other = (row[f"data/epoch/{name}"] for name in ("apples", "pears"))
        assert one / both[0] == pytest.approx(other / both[1])  # they are the same shards
    assert steps[-1]["data/documents/pears"] > steps[0]["data/documents/pears"]
    assert [row["step"] for row in found if "val/often/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in found if "val/seldom/loss" in row] == [1, 4, 6]
    assert set(result.validation) == {"often/loss", "seldom/loss"}
    page = (tmp_path / "curves.html").read_text(encoding="utf-8")
    assert all(f"</i>{name} <b>" in page for name in ("apples", "pears", "often", "seldom"))
    assert "Passes over the documents by source" in page
    assert "source 'apples': " in (told := capsys.readouterr().out)
    assert "rows of 128 tokens" in told
