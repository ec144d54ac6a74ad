"""TensorBoard and wandb, with the real libraries."""

from pathlib import Path

import pytest

from emu35.config import LogConfig, WandbMode
from emu35.log.jsonl import read_rows
from emu35.log.metrics import make_logger


def log_steps(run_dir: Path, *, config: LogConfig, first: int, last: int) -> None:
    log = make_logger(config=config, run_dir=run_dir, name="t", total_steps=6, start_step=first - 1)
    for step in range(first, last + 1):
        log.step(step, {"loss": 1 / step, "loss_text": float("nan")})
    log.validation(last, {"t2i/loss": 0.25})
    log.close()


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LogConfig(every=1, tensorboard=True)
    log_steps(tmp_path, config=config, first=1, last=5)
    log_steps(tmp_path, config=config, first=4, last=6)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("loss")[3].value == pytest.approx(0.25)
    assert events.Scalars("val/t2i/loss")[-1].value == 0.25
    assert "loss_text" not in events.Tags()["scalars"]


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_account")
def test_wandb_offline_needs_no_account_and_keeps_its_run_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    config = LogConfig(every=1, wandb=WandbMode.offline)
    log_steps(run_dir, config=config, first=1, last=3)
    run_id = (run_dir / "wandb" / "run_id.txt").read_text().strip()
    log_steps(run_dir, config=config, first=4, last=6)
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert files
    assert all(run_id in file.name and file.stat().st_size > 0 for file in files)
    assert "off from here on" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_account")
def test_wandb_online_without_account_says_so_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_steps(tmp_path, config=LogConfig(every=1, wandb=WandbMode.online), first=1, last=3)
    told = capsys.readouterr().out
    assert told.count("wandb (online) is off from here on") == 1
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 3]
