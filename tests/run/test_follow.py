"""``emu35 launch status`` and ``cancel`` of runs on this host; tests/run/test_slurm_cluster.py has
those of jobs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from emu35.cli import main
from emu35.config.io import write_config
from emu35.run.compose import compose

HOLDER = """
import os, signal, sys, time
from pathlib import Path
from emu35.run.rundir import locked
heard = []
signal.signal(signal.SIGTERM, lambda n, frame: heard.append(n))
with locked(Path(sys.argv[1])):
    print("up", flush=True)
    while len(heard) < int(sys.argv[2]):
        time.sleep(0.05)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 50 steps that stands at step 7 with step 4 saved."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step_00000004").mkdir(parents=True)
    (run_dir / "checkpoints" / ".tmp-step_00000008").mkdir()
    write_config(compose(["stage.steps=50"]), run_dir)
    rows = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 8))
    (run_dir / "metrics.jsonl").write_text(rows + '{"step": 8, "lo')
    return run_dir


@pytest.fixture
def hold(run_dir: Path):
    """Hold the folder from another process until so many SIGTERMs came."""
    started: list[subprocess.Popen[str]] = []

    def start(patience: int) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(run_dir), str(patience)],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def say(capsys, *words: str, code: int = 0) -> str:
    assert main(["launch", *words]) == code
    output = capsys.readouterr()
    return output.out + output.err


def test_status_for_people_and_for_programs(run_dir: Path, capsys, hold):
    text = say(capsys, "status", str(run_dir))
    assert text == f"{run_dir}\n  step 7/50, step 4 saved\n  held by no process\n"
    holder = hold(1)
    found = json.loads(say(capsys, "status", f"run_dir={run_dir}", "--json"))
    assert (found["step"], found["steps"], found["checkpoint"]) == (7, 50, 4)
    assert found["holder"] == f"pid {holder.pid}"


def test_cancel_asks_once_and_says_how_to_force(run_dir: Path, capsys, hold):
    holder = hold(1)
    text = say(capsys, "cancel", str(run_dir))
    assert f"pid {holder.pid} is asked to save" in text
    assert f"`emu35 launch cancel {run_dir} --force`" in text
    assert holder.wait(timeout=30) == 0


def test_force_asks_twice(run_dir: Path, capsys, hold):
    holder = hold(2)
    assert f"pid {holder.pid} has ended" in say(capsys, "cancel", str(run_dir), "--force")
    assert holder.wait(timeout=30) == 0


def test_nothing_to_cancel(run_dir: Path, capsys):
    assert f"nothing runs in {run_dir}" in say(capsys, "cancel", str(run_dir), code=2)


def test_a_holder_elsewhere_or_without_a_number_is_not_signalled(run_dir: Path, capsys, hold):
    holder = hold(1)
    (run_dir / ".lock").write_text(f"{holder.pid}\nanother-host\n")
    text = say(capsys, "cancel", str(run_dir), code=2)
    assert f"held by pid {holder.pid} on another-host; run this command there" in text
    (run_dir / ".lock").write_text("")
    assert "did not leave its number" in say(capsys, "cancel", str(run_dir), code=2)
    assert holder.poll() is None


def test_ranks_without_their_launcher(run_dir: Path, capsys, hold):
    hold(1)
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    (run_dir / ".lock").write_text(f"{gone.pid}\n")
    assert "whose launcher" in say(capsys, "cancel", str(run_dir), code=2)


def test_a_number_that_another_process_got_is_not_signalled(run_dir: Path, capsys, hold):
    holder = hold(1)
    pid, host, started = (run_dir / ".lock").read_text().split()
    (run_dir / ".lock").write_text(f"{pid}\n{host}\n{float(started) - 3600}\n")
    assert "whose launcher" in say(capsys, "cancel", str(run_dir), code=2)
    assert holder.poll() is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status"], "use `emu35 launch status RUN_DIR`"),
        (["cancel"], "use `emu35 launch cancel RUN_DIR`"),
        (["status", "one", "two"], "name one run"),
        (["cancel", "one", "run_dir=two"], "name one run"),
        (["stats", "."], "Did you mean 'status'?"),
        (["status", "nowhere"], "nowhere does not exist"),
        (["cancel", "run_dir=nowhere"], "nowhere does not exist"),
        (["status", "."], "holds no run"),
        (["status", "stage.stpes=3"], "Did you mean 'steps'?"),
    ],
)
def test_runs_that_cannot_be_found(
    words: list[str], message: str, capsys, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert message in say(capsys, *words, code=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", ".", "--force"], "--force does not go with `emu35 launch status`"),
        (["cancel", ".", "--json"], "--json does not go with `emu35 launch cancel`"),
        (["cancel", ".", "--dry-run"], "--dry-run does not go with `emu35 launch cancel`"),
        (["run_dir=x", "--force"], "--force does not go with `emu35 launch`"),
        (["run_dir=x", "--json"], "--json does not go with `emu35 launch`"),
    ],
)
def test_options_of_another_action(
    words: list[str], message: str, capsys, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["launch", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_job_without_slurm_on_this_host(run_dir: Path, capsys, monkeypatch, tmp_path: Path):
    (run_dir / "slurm_job.json").write_text('{"id": "17"}')
    monkeypatch.setenv("PATH", str(tmp_path))
    text = say(capsys, "status", str(run_dir))
    assert "step 7/50" in text
    assert "job 17: UNKNOWN (scontrol is not on this host" in text
    assert "scontrol is not on this host" in say(capsys, "cancel", str(run_dir), code=2)
    (run_dir / "slurm_job.json").write_text("{")
    assert "slurm_job.json cannot be read" in say(capsys, "status", str(run_dir), code=2)


def test_a_job_that_slurm_has_forgotten(run_dir: Path, capsys, monkeypatch, tmp_path: Path):
    (run_dir / "slurm_job.json").write_text('{"id": "17"}')
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n"
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    text = say(capsys, "status", str(run_dir))
    assert "job 17: GONE (Slurm remembers no such job" in text
    assert "job 17 is over" in say(capsys, "cancel", str(run_dir), code=2)
