"""The loop is exactly resumable, stops cleanly, and a finished run is left alone."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_task import TinyTask, fit_until, tiny_config

from emu35.config import RunConfig
from emu35.config.io import run_identity
from emu35.errors import CheckpointError, Emu35Error, Interrupted
from emu35.log.jsonl import read_rows
from emu35.train.trainer import FitResult, fit

SCRIPT = Path(__file__).with_name("tiny_task.py")
MEASURED = ("tokens_per_s", "memory_gib")


def train(
    run_dir: Path,
    *,
    stop_at: int = 0,
    config: RunConfig | None = None,
    nan_at: tuple[int, ...] = (),
) -> TinyTask:
    """Run the tiny task; ``stop_at`` sends this very process a SIGTERM during that step."""
    task = TinyTask(nan_at=nan_at)
    fit_until(task, config=config or tiny_config(), run_dir=run_dir, stop_at=stop_at)
    return task


def interrupt(
    run_dir: Path,
    *,
    stop_at: int,
    config: RunConfig | None = None,
    nan_at: tuple[int, ...] = (),
) -> None:
    with pytest.raises(Interrupted, match=rf"SIGTERM at step {stop_at}/.*same command"):
        train(run_dir, stop_at=stop_at, config=config, nan_at=nan_at)


def rows(run_dir: Path) -> list[dict[str, float]]:
    found = read_rows(run_dir / "metrics.jsonl")
    return [
        {key: row[key] for key in row if key not in MEASURED and not key.startswith("time/")}
        for row in found
    ]


# 5: a step with a checkpoint; 8: with a validation; 12: the last step, both.
@pytest.mark.parametrize("stops", [[3], [5], [8], [12], [3, 4, 9]])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, stops: list[int]
) -> None:
    whole = train(tmp_path / "whole")
    for stop in stops:
        interrupt(tmp_path / "parts", stop_at=stop)
    parts = train(tmp_path / "parts")
    assert torch.equal(whole.parameters(), parts.parameters())
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert parts.steps == list(range(stops[-1] + 1, 13))


def test_work_lost_by_a_crash_is_made_again_with_the_same_result(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")

    class Crashing(TinyTask):
        def train_step(self, step: int) -> dict[str, float]:
            if step == 9:
                raise RuntimeError("power cut")
            return super().train_step(step)

    with pytest.raises(RuntimeError, match="power cut"):
        fit(Crashing(), config=tiny_config(), run_dir=tmp_path / "crash")
    assert [row["step"] for row in rows(tmp_path / "crash")][-1] == 8
    resumed = train(tmp_path / "crash")
    assert resumed.steps[0] == 6
    assert torch.equal(whole.parameters(), resumed.parameters())
    assert rows(tmp_path / "crash") == rows(tmp_path / "whole")


def test_validation_and_checkpoints_do_not_disturb_training(tmp_path: Path) -> None:
    often = train(tmp_path / "often", config=tiny_config(validate_every=1, checkpoint_every=1))
    never = train(tmp_path / "never", config=tiny_config(validate_every=0, checkpoint_every=0))
    assert torch.equal(often.parameters(), never.parameters())
    assert (often.validations, never.validations) == (12, 1)


def test_a_run_may_validate_before_its_first_step(tmp_path: Path) -> None:
    config = tiny_config(validate_every=6)
    config.stage.validate_first = True
    first = train(tmp_path / "first", config=config)
    without = train(tmp_path / "without", config=tiny_config(validate_every=6))
    assert torch.equal(first.parameters(), without.parameters())
    rows = read_rows(tmp_path / "first" / "metrics.jsonl")
    assert [row["step"] for row in rows if "val/fit" in row] == [0, 6, 12]
    # A finished run that is started again validates no more.
    assert train(tmp_path / "first", config=config).validations == 0


class Troubled(TinyTask):
    """Something goes wrong in its first validation, and never again."""

    def validate(self, step: int) -> dict[str, float]:
        found = super().validate(step)
        return {**found, "trouble": 1.0} if self.validations == 1 else found


def test_a_trouble_that_has_passed_is_not_told_of_the_last_validation(tmp_path: Path) -> None:
    result = fit(Troubled(), config=tiny_config(), run_dir=tmp_path)
    assert "trouble" not in result.validation
    assert any("val/trouble" in row for row in read_rows(tmp_path / "metrics.jsonl"))


def test_finished_run_trains_no_more_but_holds_the_final_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = TinyTask()
    done = fit(first, config=tiny_config(), run_dir=tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    again = TinyTask(seed=5)
    result = fit(again, config=tiny_config(), run_dir=tmp_path)
    assert (again.steps, again.validations) == ([], 0)
    assert torch.equal(first.parameters(), again.parameters())
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert "already finished: 12 steps" in capsys.readouterr().out
    assert (done.steps_made, result.steps_made) == (12, 0)
    assert _lasting(result) == _lasting(done)


class Contented(TinyTask):
    """Has learned enough once the validation of step ``enough`` is over, and knows it from its own
    state, as a task does that waits for no better reward. ``enough`` may be no validation's turn:
    then it is its training step that says so."""

    def __init__(self, *, enough: int) -> None:
        super().__init__(seed=0)
        self.enough = enough

    def validate(self, step: int) -> dict[str, float]:
        found = super().validate(step)
        self._ask(step)
        return found

    def train_step(self, step: int) -> dict[str, float]:
        found = super().train_step(step)
        if step % 4:
            self._ask(step)
        return found

    def load(self, folder: Path) -> None:
        super().load(folder)
        self._ask(self.cursor)

    def _ask(self, step: int) -> None:
        self.finished = "nothing got better" if step >= self.enough else None


@pytest.mark.parametrize("enough", [8, 7])
@pytest.mark.parametrize("every", [4, 7, 0])
def test_a_task_that_has_enough_ends_the_run_for_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], enough: int, every: int
) -> None:
    """Ended by its validation or by a step in between, with a checkpoint due then or not: validated
    and saved as a last step is, and the same command trains no more."""
    config = tiny_config(checkpoint_every=every)
    task = Contented(enough=enough)
    done = fit(task, config=config, run_dir=tmp_path)
    assert task.steps == list(range(1, enough + 1))
    assert task.validations == 2
    assert done.step == done.steps_made == enough
    assert (done.checkpoint / "task.pt").exists()
    assert f"finished {enough} of 12 steps" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path) if "val/fit" in row] == [4, enough]
    before = (tmp_path / "metrics.jsonl").read_bytes()

    again = Contented(enough=enough)
    result = fit(again, config=config, run_dir=tmp_path)
    assert (again.steps, again.validations, result.steps_made) == ([], 0, 0)
    assert torch.equal(task.parameters(), again.parameters())
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert f"already finished: {enough} steps (nothing got better)" in capsys.readouterr().out
    assert _lasting(result) == _lasting(done)


def test_a_stop_between_having_enough_and_saving_it_changes_nothing(tmp_path: Path) -> None:
    whole = Contented(enough=8)
    fit(whole, config=tiny_config(), run_dir=tmp_path / "whole")

    stopped = Contented(enough=8)
    validate = stopped.validate

    def stopping(step: int) -> dict[str, float]:
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(step)

    stopped.validate = stopping  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="at step 8/12"):
        fit(stopped, config=tiny_config(), run_dir=tmp_path / "parts")
    resumed = Contented(enough=8)
    result = fit(resumed, config=tiny_config(), run_dir=tmp_path / "parts")
    assert (resumed.steps, result.step) == ([], 8)
    assert torch.equal(whole.parameters(), resumed.parameters())
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def _lasting(result: FitResult) -> tuple[object, ...]:
    return result.step, result.tokens, result.validation, result.checkpoint


def test_tokens_and_wall_time_add_up_over_interruptions(tmp_path: Path) -> None:
    config = tiny_config(steps=4)
    for stop in (1, 2):
        task = TinyTask(pause=0.1)
        make_step = task.train_step

        def step(number: int, stop: int = stop, make_step=make_step) -> dict[str, float]:
            if number == stop:
                os.kill(os.getpid(), signal.SIGUSR1)
            return make_step(number)

        task.train_step = step  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            fit(task, config=config, run_dir=tmp_path)
    result = fit(TinyTask(pause=0.1), config=config, run_dir=tmp_path)
    assert result.tokens == 4 * 32
    assert 0.4 <= result.seconds < 10


def test_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path / "whole")
    config = tiny_config(checkpoint_every=3)
    interrupt(tmp_path / "run", stop_at=7, config=config)
    newest = tmp_path / "run" / "checkpoints" / "step_00000007"
    weights = newest / "task.pt"
    weights.write_bytes(weights.read_bytes()[:-7])
    capsys.readouterr()
    resumed = train(tmp_path / "run", config=config)
    told = capsys.readouterr().out
    assert str(newest) in told
    assert "task.pt" in told
    assert "resuming at step 6/12" in told
    assert torch.equal(whole.parameters(), resumed.parameters())
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_step_that_is_not_finite_is_skipped_counted_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(TinyTask(nan_at=(6, 9)), config=tiny_config(), run_dir=tmp_path)
    told = capsys.readouterr().out
    assert "step 6 changed nothing: its loss is not finite" in told
    found = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["skipped_steps"] for row in found] == [0] * 5 + [1] * 3 + [2] * 4
    assert [row["step"] for row in found if row["loss"] is None] == [6, 9]


# Stopped at the skipped step itself, and one step after it.
@pytest.mark.parametrize("stop", [6, 7])
def test_resume_across_a_skipped_step_is_bitwise(tmp_path: Path, stop: int) -> None:
    whole = TinyTask(nan_at=(6, 9))
    fit(whole, config=tiny_config(), run_dir=tmp_path / "whole")
    interrupt(tmp_path / "parts", stop_at=stop, nan_at=(6, 9))
    parts = TinyTask(nan_at=(6, 9))
    fit(parts, config=tiny_config(), run_dir=tmp_path / "parts")
    assert parts.steps[0] == stop + 1
    assert torch.equal(whole.parameters(), parts.parameters())
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert not torch.equal(whole.parameters(), train(tmp_path / "healthy").parameters())


def test_skipped_steps_in_a_row_are_counted_over_an_interruption(tmp_path: Path) -> None:
    interrupt(tmp_path, stop_at=6, nan_at=(6,))
    with pytest.raises(Emu35Error, match="stopped at step 7: 2 step"):
        fit(TinyTask(nan_at=(7,)), config=tiny_config(), run_dir=tmp_path)


@pytest.mark.parametrize("checkpoint_every", [0, 3])
def test_too_many_skipped_steps_stop_the_run_and_name_the_checkpoint(
    tmp_path: Path, checkpoint_every: int
) -> None:
    config = tiny_config(checkpoint_every=checkpoint_every)
    with pytest.raises(Emu35Error) as caught:
        fit(TinyTask(nan_at=(4, 6, 7)), config=config, run_dir=tmp_path)
    text = str(caught.value)
    assert "stopped at step 7: 2 step(s) in a row" in text
    assert "its loss is not finite" in text
    assert ("step_00000006" if checkpoint_every else "no checkpoint yet") in text


def test_undefined_validation_loss_survives_the_checkpoint(tmp_path: Path) -> None:
    class Empty(TinyTask):
        def validate(self, step: int) -> dict[str, float]:
            return {"text": math.nan, "visual": 2.0}

    fit(Empty(), config=tiny_config(), run_dir=tmp_path)
    result = fit(Empty(), config=tiny_config(), run_dir=tmp_path)
    assert math.isnan(result.validation["text"])
    assert result.validation["visual"] == 2.0
    assert '"val/text": null' in (tmp_path / "metrics.jsonl").read_text()


def test_what_may_change_between_attempts_and_what_may_not(tmp_path: Path) -> None:
    interrupt(tmp_path, stop_at=3)
    other = tiny_config()
    other.optim.lr = 0.5
    with pytest.raises(CheckpointError, match=r"optim\.lr"):
        train(tmp_path, config=other)
    free = tiny_config(checkpoint_every=2)
    free.parallel.sp = True
    free.parallel.zero1 = True
    free.checkpoint.async_save = True
    free.stage.micro_batch_size = 4
    free.name = "renamed"
    free.log.every = 3
    assert run_identity(free) == run_identity(tiny_config())
    assert train(tmp_path, config=free).steps[0] == 4


def spawn(run_dir: Path, *options: str, ranks: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.Popen(
        [*command, str(SCRIPT), str(run_dir), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(run_dir: Path, *, step: int, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 60
    while time.monotonic() < limit and process.poll() is None:
        if any(row["step"] >= step for row in read_rows(run_dir / "metrics.jsonl")):
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"step {step} was not reached:\n{process.communicate()[0]}")


def finish(process: subprocess.Popen[str], *, code: int) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    return output


def assert_same_as_uninterrupted(run_dir: Path, *, parameters: torch.Tensor) -> None:
    whole = train(run_dir.with_name("whole"), config=tiny_config(steps=30))
    assert torch.equal(parameters, whole.parameters())
    assert rows(run_dir) == rows(run_dir.with_name("whole"))


def test_sigterm_to_a_process_exits_75_and_the_same_command_finishes(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = ("--steps", "30", "--pause", "0.05")
    process = spawn(run_dir, *command)
    wait_for_step(run_dir, step=7, process=process)
    process.send_signal(signal.SIGTERM)
    assert "same command" in finish(process, code=75)
    assert not (run_dir / "final.pt").exists()
    finish(spawn(run_dir, *command), code=0)
    assert_same_as_uninterrupted(run_dir, parameters=torch.load(run_dir / "final.pt"))


def test_kill_9_costs_the_steps_since_the_checkpoint_and_no_more(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = spawn(run_dir, "--steps", "30", "--pause", "0.2")
    wait_for_step(run_dir, step=13, process=process)
    process.kill()
    finish(process, code=-signal.SIGKILL)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')  # what a kill in the middle of a write leaves
    resumed = train(run_dir, config=tiny_config(steps=30))
    assert resumed.steps[0] > 10
    assert_same_as_uninterrupted(run_dir, parameters=resumed.parameters())


def test_second_signal_leaves_at_once_even_from_code_that_hangs(tmp_path: Path) -> None:
    process = spawn(tmp_path / "run", "--hang-at", "1")
    assert process.stdout is not None
    while "hanging" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "leaving at once" in finish(process, code=128 + signal.SIGTERM)


@pytest.mark.multiproc
def test_signal_to_one_rank_makes_all_ranks_save_the_same_step(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = spawn(run_dir, "--steps", "200", "--pause", "0.05", ranks=2)
    try:
        wait_for_step(run_dir, step=3, process=process)
        ranks = _children(process.pid)
        assert set(ranks) == {0, 1}
        os.kill(ranks[1], signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
    finally:
        _end_session(process)
    assert "a signal to another rank" in output  # rank 0, which got none
    assert "SIGUSR1 at step" in output
    newest = max((run_dir / "checkpoints").iterdir())
    assert {"rng_00000.pt", "rng_00001.pt", "task.pt"} <= {file.name for file in newest.iterdir()}
    steps = [row["step"] for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]
    assert newest.name == f"step_{steps[-1]:08d}"
    for pid in ranks.values():
        assert not Path(f"/proc/{pid}").exists()


def _children(pid: int) -> dict[int, int]:
    """Rank -> process id of the workers that torchrun started."""
    found: dict[int, int] = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for entry in environment:
            if entry.startswith(b"RANK="):
                found[int(entry[5:])] = int(child)
    return found


def _end_session(process: subprocess.Popen[str]) -> None:
    """Nothing of a test may stay behind, whatever happened in it."""
    for pid in (*_children(process.pid).values(), process.pid) if process.poll() is None else ():
        os.kill(pid, signal.SIGKILL)
    process.wait(timeout=30)


class Thinned(TinyTask):
    """A set of every validation, and one of every other."""

    def validate(self, step: int) -> dict[str, float]:
        found = {"often": super().validate(step)["fit"]}
        if step in (4, 12):
            found["seldom"] = float(step)
        return found


def test_a_set_without_its_turn_keeps_its_value_and_is_not_logged_again(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit_until(Thinned(), config=tiny_config(), run_dir=tmp_path, stop_at=9)
    newest = max((tmp_path / "checkpoints").iterdir())
    kept = json.loads((newest / "manifest.json").read_text())["extra"]["validation"]
    assert kept["seldom"] == 4.0
    result = fit(Thinned(), config=tiny_config(), run_dir=tmp_path)
    logged = [(row["step"], "val/seldom" in row) for row in rows(tmp_path) if "val/often" in row]
    assert logged == [(4, True), (8, False), (12, True)]
    assert result.validation["seldom"] == 12.0
