"""A rank that dies, is stopped or hangs ends the run within the timeout, and is named.

Real ranks train the tiny task over gloo, started by the real launcher; signals are real.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiproc

TASK = Path(__file__).parents[1] / "train" / "tiny_task.py"
TIMEOUT = 8
LAUNCHER = """
import sys
from emu35.errors import Emu35Error
from emu35.run.compose import compose
from emu35.run.local_ranks import run_ranks
from emu35.run.rundir import open_run
run_dir, *command = sys.argv[1:]
try:
    with open_run(compose([f"run_dir={run_dir}", "launch.nproc=2"])) as run:
        sys.exit(run_ranks(compose(["launch.nproc=2"]), run_dir=run.path, lock=run.lock,
                           command=[sys.executable, "-u", *command]))
except Emu35Error as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


class Run:
    """A launcher with two ranks; whatever is left of them ends with the test."""

    def __init__(self, run_dir: Path, *options: str) -> None:
        self.run_dir = run_dir
        command = [str(TASK), str(run_dir), "--timeout", str(TIMEOUT), *options]
        self.launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(run_dir), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pids: list[int] = []

    def wait_for_step(self, step: int) -> None:
        """Until both ranks have made ``step`` steps."""
        limit = time.monotonic() + 90
        while time.monotonic() < limit and self.launcher.poll() is None:
            signs = [self.sign(rank) for rank in (0, 1)]
            if all(sign and sign["step"] >= step for sign in signs):
                self.pids = [sign["pid"] for sign in signs if sign]
                return
            time.sleep(0.05)
        self.kill()
        pytest.fail(f"step {step} was not reached:\n{self.launcher.communicate()}")

    def sign(self, rank: int) -> dict | None:
        try:
            return json.loads((self.run_dir / "logs" / f"rank{rank}.alive").read_text())
        except FileNotFoundError:
            return None

    def kill(self) -> None:
        """End the launcher and its ranks, which would outlive it."""
        if self.launcher.poll() is not None:
            return
        children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children")
        for pid in (*map(int, children.read_text().split()), self.launcher.pid):
            os.kill(pid, signal.SIGKILL)

    def end(self) -> tuple[int, str, float]:
        """(exit code, what was said to the user, seconds that took)."""
        began = time.monotonic()
        output, errors = self.launcher.communicate(timeout=90)
        return self.launcher.returncode, output + errors, time.monotonic() - began


@pytest.fixture
def start(tmp_path: Path):
    runs: list[Run] = []

    def begin(*options: str) -> Run:
        runs.append(Run(tmp_path / "run", *options))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()
        run.launcher.wait()
        for pid in run.pids:
            assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


ENDLESS = (
    *("--steps", "100000", "--pause", "0.05"),
    *("--validate-every", "0", "--checkpoint-every", "0"),
)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_within_the_timeout(start, victim: int) -> None:
    run = start(*ENDLESS)
    run.wait_for_step(3)
    os.kill(run.pids[victim], signal.SIGSTOP)
    code, told, seconds = run.end()
    assert code == 2
    # The timeout, some intervals of a tenth of it, and the launcher's five seconds of grace.
    assert TIMEOUT - 1 < seconds < TIMEOUT + 20
    other = 1 - victim
    assert f"rank {other} made no progress for" in told
    assert re.search(r"in all_\w+, called by \w+ \(emu35/parallel/collectives\.py:\d+\)", told)
    assert f"Stopped or dead: rank {victim} on " in told
    assert f"(pid {run.pids[victim]}), last seen" in told
    logs = run.run_dir / "logs"
    assert "collectives.py" in (logs / f"rank{other}.hang.txt").read_text()
    assert b"gloo:all_" in (logs / f"rank{other}.flight.pickle").read_bytes()


def test_a_killed_rank_is_named_at_once(start) -> None:
    run = start(*ENDLESS)
    run.wait_for_step(3)
    os.kill(run.pids[1], signal.SIGKILL)
    code, told, seconds = run.end()
    assert code == 2
    assert seconds < 20
    assert "rank 1 was killed by SIGKILL" in told
    assert "Stopped or dead: rank 1 on " in told


@pytest.mark.slow
def test_a_rank_that_hangs_alive_is_named_as_behind(start) -> None:
    run = start(*ENDLESS, "--hang-rank", "1", "--hang-at", "5")
    run.wait_for_step(4)
    code, told, _ = run.end()
    assert code == 2
    assert "Alive, but behind the others: rank 1 on " in told
    assert "in step 5, data" in told


@pytest.mark.slow
def test_what_is_slow_but_moves_is_left_alone(start) -> None:
    """Validation and saving each take longer than the timeout; a rank is stopped for a while."""
    slow = str(2 * TIMEOUT)
    run = start(
        *("--steps", "60", "--pause", "0.1", "--validate-every", "0", "--checkpoint-every", "0"),
        *("--slow-validation", slow, "--slow-save", slow),
    )
    run.wait_for_step(3)
    os.kill(run.pids[1], signal.SIGSTOP)
    time.sleep(TIMEOUT / 2)
    os.kill(run.pids[1], signal.SIGCONT)
    code, told, _ = run.end()
    assert code == 0, told
    assert "finished 60 steps" in told
    assert not list((run.run_dir / "logs").glob("*.alive"))
    assert not list((run.run_dir / "logs").glob("*.hang.txt"))
