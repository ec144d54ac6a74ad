"""What a run leaves in metrics.jsonl and on the screen, and what cannot disturb it."""

import io
import json
import os
import sys
import time
from pathlib import Path

import pytest

from emu35.config import LogConfig, WandbMode
from emu35.log.jsonl import read_rows
from emu35.log.metrics import make_logger
from emu35.log.sinks import Guarded

NAN = float("nan")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def log_steps(run_dir: Path, *, first: int, last: int, every: int = 1, tokens: float = 10) -> None:
    log = make_logger(
        config=LogConfig(every=every),
        run_dir=run_dir,
        name="t",
        total_steps=20,
        start_step=first - 1,
    )
    for step in range(first, last + 1):
        log.step(step, {"loss": 1 / step, "tokens": tokens, "lr": 1e-3})
    log.close()


def steps(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_rows(run_dir / "metrics.jsonl")]


def test_rows_are_the_first_step_every_nth_and_the_last(tmp_path: Path) -> None:
    log_steps(tmp_path, first=1, last=20, every=6)
    assert steps(tmp_path) == [1, 6, 12, 18, 20]
    row = read_rows(tmp_path / "metrics.jsonl")[1]
    assert list(row) == ["step", "loss", "tokens", "lr", "tokens_per_s"]
    assert (row["loss"], row["tokens"], row["lr"]) == (1 / 6, 10, 1e-3)


def test_every_step_appears_once_after_a_resume(tmp_path: Path) -> None:
    log_steps(tmp_path, first=1, last=13)
    log_steps(tmp_path, first=11, last=20)
    assert steps(tmp_path) == list(range(1, 21))


def test_start_from_the_beginning_clears_the_rows_of_an_attempt_without_checkpoint(
    tmp_path: Path,
) -> None:
    log_steps(tmp_path, first=1, last=4)
    log_steps(tmp_path, first=1, last=2)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "damage", [b'{"step": 6, "los', b"\xff\xfe\n", b"[]\n", b'{"loss": 1}\n', b"\n"]
)
def test_damaged_line_is_removed_and_told(
    tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    log_steps(tmp_path, first=1, last=5)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    capsys.readouterr()
    log_steps(tmp_path, first=6, last=7)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").open())
    assert "removed 1 damaged line" in capsys.readouterr().out


def test_last_row_without_line_end_is_kept_whole(tmp_path: Path) -> None:
    log_steps(tmp_path, first=1, last=2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    log_steps(tmp_path, first=3, last=3)
    assert steps(tmp_path) == [1, 2, 3]


def test_file_is_strict_json_whatever_the_numbers(tmp_path: Path) -> None:
    log = make_logger(config=LogConfig(every=1), run_dir=tmp_path, name="t", total_steps=2)
    log.step(1, {"loss": NAN, "grad_norm": float("inf"), "tokens": 4.0})
    log.validation(1, {"t2i/loss": NAN, "val/i2t/loss": 2.5})
    log.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    train, validation = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (train["loss"], train["grad_norm"], train["tokens"]) == (None, None, 4)
    assert validation == {"step": 1, "val/t2i/loss": None, "val/i2t/loss": 2.5}


def test_throughput_counts_all_steps_since_the_last_row_but_not_time_aside(tmp_path: Path) -> None:
    log = make_logger(config=LogConfig(every=5), run_dir=tmp_path, name="t", total_steps=5)
    log.step(1, {"loss": 1.0, "tokens": 100})
    for step in range(2, 6):
        time.sleep(0.05)
        if step == 3:
            with log.aside("validating"):
                time.sleep(0.5)
        log.step(step, {"loss": 1.0, "tokens": 100})
    log.close()
    rate = read_rows(tmp_path / "metrics.jsonl")[-1]["tokens_per_s"]
    assert 400 / 0.6 < rate <= 400 / 0.2


def test_full_disk_loses_no_row_and_leaves_no_torn_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = make_logger(config=LogConfig(every=1), run_dir=tmp_path, name="t", total_steps=9)
    real = os.write

    def full(file: int, content: bytes) -> int:
        if len(content) > 5:
            return real(file, content[:5])
        raise OSError(28, "No space left on device")

    log.step(1, {"loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        log.step(2, {"loss": 1.0})
        log.step(3, {"loss": 1.0})
        assert steps(tmp_path) == [1]
    log.step(4, {"loss": 1.0})
    log.close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("No space left on device") == 1


def test_plain_output_has_step_total_loss_rate_and_eta(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_steps(tmp_path, first=1, last=20, every=10, tokens=123456)
    out = capsys.readouterr().out
    assert "\r" not in out
    lines = out.splitlines()
    assert len(lines) == 3
    for part in ("step 10/20", "loss 0.1000", "tokens/s", "ETA 0:00"):
        assert part in lines[1]


def test_terminal_output_redraws_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    log_steps(tmp_path, first=1, last=20, every=1)
    shown = terminal.getvalue()
    assert shown.count("\n") == 1
    assert shown.count("\r\x1b[K") == 19
    assert "\r\x1b[Kstep 20/20" in shown


def test_reader_that_goes_away_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Broken())
    log_steps(tmp_path, first=1, last=3)
    assert steps(tmp_path) == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = make_logger(
        config=LogConfig(every=1, tensorboard=True, wandb=WandbMode.offline),
        run_dir=tmp_path,
        name="t",
        total_steps=2,
        rank=1,
    )
    with log.aside("validating"):
        log.step(1, {"loss": 1.0})
    log.validation(1, {"a": 1.0})
    log.message("hello")
    log.flush()
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_view_that_fails_is_dropped_with_one_message() -> None:
    class Flaky:
        def write(self, row: object) -> None:
            raise ConnectionError("server\n  went away")

        def flush(self) -> None: ...

        def close(self) -> None: ...

    told: list[str] = []
    sink = Guarded(name="wandb", build=Flaky, warn=told.append)
    for step in (1, 2):
        sink.write({"step": step})
    sink.close()
    assert len(told) == 1
    assert "wandb is off from here on (server went away)" in told[0]
