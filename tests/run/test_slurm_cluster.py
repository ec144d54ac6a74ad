"""A run as a job of a real Slurm with two nodes, both on this machine (see ``slurm_cluster``)."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster, missing_here, slurm_cluster
from tiny_run import newest_step, overrides, rows

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(missing_here()), reason=missing_here()),
]

STEPS, BATCH = 60, 96
"""Long enough that Slurm, which looks at time limits twice a minute, can interrupt it."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shards(fruit_shards: Path) -> Path:
    return fruit_shards


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The metrics of two local ranks that nobody interrupted."""
    run_dir = tmp_path_factory.mktemp("local") / "run"
    words = overrides(run_dir, shards=shards, steps=STEPS, batch=BATCH)
    command = [sys.executable, "-m", "emu35", "run", "launch.nproc=2", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return rows(run_dir)


class Run:
    """A run folder and the commands a user would give."""

    def __init__(self, run_dir: Path, *, cluster: SlurmCluster) -> None:
        self.run_dir, self.cluster = run_dir, cluster

    def launch(self, *arguments: str, code: int = 0) -> str:
        """What ``emu35 launch`` prints, its errors included."""
        done = subprocess.run(
            [sys.executable, "-m", "emu35", "launch", *arguments],
            env=dict(self.cluster.environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, shards: Path, *more: str, code: int = 0) -> str:
        words = overrides(self.run_dir, shards=shards, steps=STEPS, batch=BATCH)
        cluster = "launch=slurm launch.nodes=2 launch.nproc=1 launch.slurm.gpus=0"
        variables = "launch.env={GLOO_SOCKET_IFNAME: lo}"
        return self.launch(*words, *cluster.split(), variables, *more, code=code)

    def status(self) -> dict[str, Any]:
        return json.loads(self.launch("status", str(self.run_dir), "--json"))

    def wait(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status that satisfies ``condition``."""
        deadline = time.monotonic() + 900
        while not condition(found := self.status()):
            assert time.monotonic() < deadline, f"{found}\n{self.output()}\n{self.cluster.logs()}"
            time.sleep(1.0)
        return found

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 900
        while newest_step(self.run_dir) < step:
            assert time.monotonic() < deadline, self.output() + self.cluster.logs()
            time.sleep(0.2)

    def output(self) -> str:
        logs = (self.run_dir / "logs").glob("slurm-*.out")
        return "\n".join(log.read_text(errors="replace") for log in logs)


def over(found: dict[str, Any]) -> bool:
    return found["state"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")


def test_a_job_saves_before_its_limit_goes_back_into_the_queue_and_finishes(
    tmp_path: Path, cluster: SlurmCluster, shards: Path, reference: list[dict[str, float]]
) -> None:
    run = Run(tmp_path / "a run's 100% folder", cluster=cluster)
    assert "submitted job " in run.submit(shards, "launch.slurm.time=60")
    job = str(run.status()["job"])
    assert f"job {job} of" in run.submit(shards, "launch.slurm.time=60", code=2)

    run.wait_for_step(2)
    found = run.status()
    assert (found["state"], found["steps"]) == ("RUNNING", STEPS)
    assert "on n[1-2]" in found["detail"]
    # The limit comes near: two minutes are then less than launch.slurm.save_seconds=120.
    elapsed = cluster.call("squeue", "-h", "-j", job, "-o", "%M").strip()
    minutes = sum(int(x) * 60**i for i, x in enumerate(reversed(elapsed.split(":")))) // 60
    cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")

    found = run.wait(lambda found: found["state"] != "RUNNING" and "restarts 1" in found["detail"])
    assert found["state"] == "PENDING", run.output()
    assert 2 <= found["step"] == found["checkpoint"] < STEPS
    assert "stopped by SIGUSR1" in run.output()
    assert "interrupted and saved; the job is to go back into the queue" in run.output()

    # Slurm holds a requeued job back for two minutes.
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=60")
    found = run.wait(over)
    assert found["state"] == "COMPLETED", run.output()
    assert found["step"] == found["checkpoint"] == STEPS
    assert found["job"] == job
    assert f"resuming at step {found_step(run)}/{STEPS}" in run.output()
    assert rows(run.run_dir) == reference
    assert "nothing runs in" in run.launch("cancel", str(run.run_dir), code=2)


def found_step(run: Run) -> int:
    """The step at which the first life of the job stopped."""
    line = next(x for x in run.output().splitlines() if "stopped by SIGUSR1 at step" in x)
    return int(line.split("at step ")[1].split("/")[0])


def test_cancel_saves_and_the_job_stays_away(
    tmp_path: Path, cluster: SlurmCluster, shards: Path
) -> None:
    run = Run(tmp_path / "run", cluster=cluster)
    run.submit(shards)
    run.wait_for_step(2)
    assert "asked to save" in run.launch("cancel", f"run_dir={run.run_dir}")
    found = run.wait(over)
    assert (found["state"], "exit code 75:0" in found["detail"]) == ("FAILED", True), run.output()
    assert 2 <= found["step"] == found["checkpoint"] < STEPS

    # The same command goes on; --force waits for nobody (Slurm gives ranks a few seconds to save).
    run.submit(shards)
    run.wait_for_step(found["checkpoint"] + 1)
    assert "within seconds is lost" in run.launch("cancel", str(run.run_dir), "--force")
    ended = run.wait(over)
    assert ended["state"] == "CANCELLED"
    assert found["checkpoint"] <= ended["checkpoint"] < STEPS
    assert not ended["holder"]


def test_a_waiting_job_is_cancelled_at_once(
    tmp_path: Path, cluster: SlurmCluster, shards: Path
) -> None:
    run = Run(tmp_path / "run", cluster=cluster)
    run.submit(shards, 'launch.slurm.options=["--begin=now+1hour"]')
    assert run.status()["state"] == "PENDING"
    assert "was PENDING and is cancelled" in run.launch("cancel", str(run.run_dir))
    assert run.wait(over)["state"] == "CANCELLED"


def test_a_job_that_slurm_refuses_says_why(
    tmp_path: Path, cluster: SlurmCluster, shards: Path
) -> None:
    run = Run(tmp_path / "run", cluster=cluster)
    told = run.submit(shards, "launch.slurm.partition=nowhere", code=2)
    assert "sbatch refused" in told
    assert "invalid partition" in told
