"""Saving in the background: the same checkpoints, the same guarantees, and training goes on."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from test_trainer import _children, _end_session, finish, rows, spawn
from tiny_task import StagedTask, fit_until, tiny_config

from emu35.checkpoint.manager import find_checkpoint, list_steps
from emu35.errors import CheckpointError, Interrupted
from emu35.train.trainer import fit

PAUSE = 0.3
"""Seconds a write takes here, while a step takes a few milliseconds."""


def train(run_dir: Path, *, async_save: bool = True, stop_at: int = 0) -> StagedTask:
    task = StagedTask(write_pause=PAUSE if async_save else 0.0)
    config = tiny_config(async_save=async_save)
    fit_until(task, config=config, run_dir=run_dir, stop_at=stop_at)
    return task


def saved(run_dir: Path, *, step: int) -> dict:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    assert (folder / "contents").read_text() == "complete"
    return torch.load(folder / "task.pt", weights_only=True)


def test_checkpoints_hold_the_state_of_their_step_although_training_went_on(tmp_path: Path) -> None:
    written_at: list[int] = []

    class Watching(StagedTask):
        def train_step(self, step: int) -> dict[str, float]:
            if any((tmp_path / "async" / "checkpoints").glob(".tmp-*")):
                written_at.append(step)
            return super().train_step(step)

    task = Watching(write_pause=PAUSE)
    fit(task, config=tiny_config(async_save=True), run_dir=tmp_path / "async")
    other = train(tmp_path / "sync", async_save=False)
    assert {6, 7, 11, 12} <= set(written_at)  # steps were made while 5 and 10 were being written
    assert torch.equal(task.parameters(), other.parameters())
    assert rows(tmp_path / "async") == rows(tmp_path / "sync")
    assert list_steps(tmp_path / "async" / "checkpoints") == [10, 12]
    for step in (10, 12):
        ours, theirs = (saved(tmp_path / kind, step=step) for kind in ("async", "sync"))
        assert ours["cursor"] == theirs["cursor"] == step
        for name, tensor in theirs["model"].items():
            assert torch.equal(ours["model"][name], tensor)
        assert str(ours["optimizer"]) == str(theirs["optimizer"])


@pytest.mark.parametrize("stop", [5, 6, 10])
def test_stopped_while_a_save_is_in_flight_and_resumed_bitwise(tmp_path: Path, stop: int) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"at step {stop}/12"):
        train(tmp_path / "parts", stop_at=stop)
    # The one in flight was completed, and the step of the stop was saved, once.
    assert list_steps(tmp_path / "parts" / "checkpoints") == sorted({5, stop})
    assert not list((tmp_path / "parts" / "checkpoints").glob(".*"))
    parts = train(tmp_path / "parts")
    assert parts.steps[0] == stop + 1
    assert torch.equal(whole.parameters(), parts.parameters())
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_a_failure_in_the_background_ends_the_run_like_one_in_the_foreground(
    tmp_path: Path,
) -> None:
    task = StagedTask(write_pause=0.05, pause=0.05, fail_at=10)
    with pytest.raises(CheckpointError, match=r"step_00000010: .*No space left.*bytes free"):
        fit(task, config=tiny_config(steps=30, async_save=True), run_dir=tmp_path)
    assert 10 < task.steps[-1] < 15  # noticed at a step boundary soon after
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]
    assert find_checkpoint(tmp_path / "checkpoints") is not None


def test_an_error_of_training_waits_for_the_thread_and_keeps_the_previous(tmp_path: Path) -> None:
    class Crashing(StagedTask):
        def train_step(self, step: int) -> dict[str, float]:
            if step == 11:
                raise RuntimeError("power cut")
            return super().train_step(step)

    with pytest.raises(RuntimeError, match="power cut"):
        fit(Crashing(write_pause=PAUSE), config=tiny_config(async_save=True), run_dir=tmp_path)
    found = find_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 5
    whole, resumed = train(tmp_path / "whole"), train(tmp_path)
    assert resumed.steps[0] == 6
    assert torch.equal(whole.parameters(), resumed.parameters())


def wait_for_writing(run_dir: Path, *, step: int, process: subprocess.Popen[str]) -> None:
    folder = run_dir / "checkpoints" / f".tmp-step_{step:08d}"
    limit = time.monotonic() + 100
    while time.monotonic() < limit and process.poll() is None:
        # The generators are written before the state, whose writing has begun shortly after.
        if (folder / "rng_00000.pt").exists():
            return
        time.sleep(0.01)
    if process.poll() is None:
        # torchrun alone would leave its ranks, which hold the pipe that is read below.
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    pytest.fail(f"no save of step {step} began:\n{process.communicate()[0]}")


def test_kill_9_during_a_save_leaves_the_previous_checkpoint_as_the_newest(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = ("--steps", "30", "--write-pause", "1", "--pause", "0.02")
    process = spawn(run_dir, *command)
    wait_for_writing(run_dir, step=10, process=process)
    process.kill()
    finish(process, code=-signal.SIGKILL)
    found = find_checkpoint(run_dir / "checkpoints")
    assert found is not None
    assert found.step == 5
    resumed = StagedTask()
    fit(resumed, config=tiny_config(steps=30, async_save=True), run_dir=run_dir)
    assert resumed.steps[0] == 6
    whole = StagedTask()
    fit(whole, config=tiny_config(steps=30), run_dir=tmp_path / "whole")
    assert torch.equal(resumed.parameters(), whole.parameters())
    assert rows(run_dir) == rows(tmp_path / "whole")
    shutil.rmtree(run_dir)


@pytest.mark.slow
@pytest.mark.multiproc
def test_two_ranks_stopped_during_a_save_complete_it_and_save_the_same_step(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = ("--steps", "500", "--write-pause", "1", "--pause", "0.02")
    process = spawn(run_dir, *command, ranks=2)
    try:
        wait_for_writing(run_dir, step=10, process=process)
        ranks = _children(process.pid)
        os.kill(ranks[1], signal.SIGTERM)
        output, _ = process.communicate(timeout=100)
    finally:
        _end_session(process)
    assert "a signal to another rank" in output
    steps = list_steps(run_dir / "checkpoints")
    assert 10 in steps
    for step in steps:
        found = find_checkpoint(run_dir / "checkpoints", step=step)
        assert found is not None
        assert {"task.pt", "task_1.pt", "contents"} <= {path.name for path in found.path.iterdir()}
    last = [row["step"] for row in rows(run_dir) if "loss" in row][-1]
    assert steps[-1] == last
