"""``emu35 convert reshard``: a run folder for another layout that goes on like the old one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_language_model_runs import STEPS, STOP, config, rows, shards, state
from torchrun_ranks import run_ranks

from emu35 import cli
from emu35.checkpoint import reshard as streaming
from emu35.checkpoint.manager import find_checkpoint
from emu35.checkpoint.source import open_source
from emu35.config import CheckpointConfig, Precision, PretrainConfig
from emu35.config.io import read_config, write_config
from emu35.errors import CheckpointError
from emu35.stages import pretrain

__all__ = ["shards"]
MASTER = "optimizer.state.fp32_param."


@pytest.fixture(scope="module")
def fp32_run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "fp32"
    return train(folder, shards=shards)


@pytest.fixture(scope="module")
def bf16_run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "bf16"
    return train(folder, shards=shards, precision=Precision.bf16)


def train(folder: Path, *, shards: Path, **values: Any) -> Path:
    made = config(folder, shards=shards, stage=stage(**values))
    made.log.every = 1
    write_config(made, folder)
    pretrain.run(made, run_dir=folder)
    return folder


def stage(**values: Any) -> PretrainConfig:
    return PretrainConfig(steps=STEPS, global_batch_size=4, validate_every=0, **values)


def convert(run: Path, out: Path, *words: str, code: int = 0) -> Path:
    command = ["convert", "reshard", "--run", str(run), "--out", str(out), *words]
    assert cli.main(command) == code
    return out


def later(run: Path) -> list[dict[str, float]]:
    return [row for row in rows(run) if row["step"] > STOP]


def assert_continued(out: Path, *, run: Path) -> None:
    ours, theirs = later(out), later(run)
    assert len(ours) == len(theirs) == STEPS - STOP
    for a, b in zip(ours, theirs, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("pieces", ["whole", "divided"])
def test_the_optimizer_changes_its_form_and_training_goes_on(
    fp32_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: str
) -> None:
    if pieces == "divided":
        monkeypatch.setattr(streaming, "CHUNK_BYTES", 1000)
        monkeypatch.setattr(streaming, "FILE_BYTES", 20_000)
    words = ["--step", str(STOP), "parallel.zero1=true"]
    out = convert(fp32_run, tmp_path / "out", *words)
    files = list((out / "checkpoints").glob("*/state/*.distcp"))
    assert (len(files) > 3) == (pieces == "divided")
    ours, theirs = state(out, step=STOP), state(fp32_run, step=STOP)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    shutil.move(fp32_run, fp32_run.with_name("away"))  # it needs nothing of the old folder
    try:
        changed = read_config(out)
        assert changed.parallel.zero1
        assert changed.run_dir == str(out)
        pretrain.run(changed, run_dir=out)
    finally:
        shutil.move(fp32_run.with_name("away"), fp32_run)
    assert_continued(out, run=fp32_run)


@pytest.mark.multiproc
@pytest.mark.timeout(600)
def test_two_tensor_parallel_ranks_continue_what_one_process_trained(
    fp32_run: Path, tmp_path: Path
) -> None:
    words = ["launch.nproc=2", "parallel.tp=2", "parallel.sp=true", "parallel.zero1=true"]
    out = convert(fp32_run, tmp_path / "out", "--step", str(STOP), *words)
    output = run_ranks(["-m", "emu35.run.worker", str(out)], ranks=2, timeout=580)
    assert f"resuming at step {STOP}" in output
    assert_continued(out, run=fp32_run)


def test_fp32_parameters_are_made_of_the_masters_and_become_them(
    bf16_run: Path, tmp_path: Path
) -> None:
    trained = state(bf16_run, step=STOP)
    names = [name for name in trained if not name.startswith("optimizer.state.")]
    assert any(not torch.equal(trained[n].float(), trained[MASTER + n]) for n in names)

    fp32 = convert(bf16_run, tmp_path / "fp32", "--step", str(STOP), "--dtype", "fp32")
    wide = state(fp32, step=STOP)
    assert not any(name.startswith(MASTER) for name in wide)
    assert all(torch.equal(wide[name], trained[MASTER + name]) for name in names)
    assert read_config(fp32).stage.precision is Precision.fp32

    bf16 = convert(fp32, tmp_path / "bf16", "--dtype", "bf16")
    again = state(bf16, step=STOP)
    assert again.keys() == trained.keys()
    assert all(torch.equal(again[name], trained[name]) for name in trained)
    pretrain.run(read_config(bf16), run_dir=bf16)
    assert later(bf16) == later(bf16_run)


def test_weights_alone_start_a_run_but_do_not_resume_one(
    fp32_run: Path, tmp_path: Path, shards: Path
) -> None:
    out = convert(fp32_run, tmp_path / "out", "--weights-only")
    assert not any(name.startswith("optimizer.") for name in state(out, step=STEPS))
    with pytest.raises(CheckpointError, match=r"no optimizer state .* stage\.init_from"):
        pretrain.run(read_config(out), run_dir=out)
    ours, theirs = open_source(out), open_source(fp32_run)
    pairs = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    child = train(tmp_path / "child", shards=shards, init_from=str(out))
    assert rows(child)[0]["loss"] < rows(fp32_run)[0]["loss"] - 0.5
    # Nor is there an optimizer to convert.
    convert(out, tmp_path / "more", code=2)
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["parallel.tp=3"], "tp=3 does not divide num_kv_heads=2"),
        (["parallel.pp=4"], "does not divide num_layers=2"),
        (["parallel.tpp=2"], "Did you mean 'tp'"),
        (["optim.lr=0.5"], "optim.lr decides what is computed"),
        (["parallel=tp8_cp1"], "chooses a whole group"),
        (["--step", "4"], "no checkpoint of step 4"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    fp32_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    out = convert(fp32_run, tmp_path / "out", *words, code=2)
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_folders_are_checked(
    fp32_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(tmp_path / "nowhere", tmp_path / "out", code=2)
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("precious")
    convert(fp32_run, tmp_path / "taken", code=2)
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "taken" / "mine").read_text() == "precious"


def test_a_damaged_checkpoint_is_passed_over_and_named(
    fp32_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(fp32_run, run)
    piece = next((run / "checkpoints" / f"step_{STEPS:08d}" / "state").glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[:-1])
    out = convert(run, tmp_path / "out")
    assert piece.name in capsys.readouterr().out
    found = find_checkpoint(out / "checkpoints")
    assert found is not None
    assert found.step == STOP


def test_layout_and_rotation_may_change_together(fp32_run: Path, tmp_path: Path) -> None:
    words = ["launch.nproc=2", "parallel.pp=2", "checkpoint.async_save=true"]
    out = convert(fp32_run, tmp_path / "out", *words)
    changed = read_config(out)
    assert changed.parallel.pp == 2
    assert changed.checkpoint == CheckpointConfig(every=STOP, keep_last=5, async_save=True)
    write_config(changed, out)  # and it is a valid configuration as it stands
    manifest = json.loads((out / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").read_text())
    assert not any(name.startswith("rng_") for name in manifest["files"])
