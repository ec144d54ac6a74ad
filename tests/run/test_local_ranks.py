"""Local ranks: started together, stopped together, and answered for. Ranks here are scripts."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emu35.errors import LaunchError
from emu35.run.compose import compose
from emu35.run.local_ranks import run_ranks

pytestmark = pytest.mark.multiproc

LAUNCHER = """
import sys
from pathlib import Path
from emu35.run.compose import compose
from emu35.run.local_ranks import run_ranks
from emu35.run.rundir import open_run
script, run_dir = sys.argv[1:]
with open_run(compose([f"run_dir={run_dir}", "launch.nproc=2"])) as run:
    sys.exit(run_ranks(compose(["launch.nproc=2"]), run_dir=run.path, lock=run.lock,
                       command=[sys.executable, "-u", "-c", script]))
"""


@pytest.fixture(autouse=True)
def folder_for_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FOLDER", str(tmp_path))


@pytest.fixture
def lock(tmp_path: Path):
    descriptor = os.open(tmp_path / ".lock", os.O_CREAT | os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def run_two(script: str, *, folder: Path, lock: int) -> int:
    config = compose(["launch.nproc=2"])
    return run_ranks(
        config, run_dir=folder, lock=lock, command=[sys.executable, "-u", "-c", script]
    )


def start_launcher(script: str, *, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, script, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_ranks_know_each_other(tmp_path: Path, lock: int):
    script = (
        "import os, pathlib; e = os.environ; pathlib.Path(e['FOLDER'], 'r' + e['RANK']).write_text("
        "' '.join(e[k] for k in ('LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')))"
    )
    assert run_two(script, folder=tmp_path, lock=lock) == 0
    first, second = ((tmp_path / f"r{rank}").read_text().split() for rank in (0, 1))
    assert first[:3] == ["0", "2", "127.0.0.1"]
    assert second[:3] == ["1", "2", "127.0.0.1"]
    assert first[3] == second[3]


def test_a_rank_that_fails_takes_the_others_and_is_named(tmp_path: Path, lock: int):
    script = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit('something broke here')\n"
        "open(os.environ['FOLDER'] + '/pid', 'w').write(str(os.getpid())); time.sleep(600)"
    )
    with pytest.raises(LaunchError) as caught:
        run_two(script, folder=tmp_path, lock=lock)
    assert "rank 1 ended with exit code 1" in str(caught.value)
    assert "something broke here" in str(caught.value)
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_killed_rank_is_blamed_rather_than_those_it_left_alone(tmp_path: Path, lock: int):
    script = (
        "import os, signal, sys, time\n"
        "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(0.5); sys.exit(1)"
    )
    with pytest.raises(LaunchError, match="rank 1 was killed by SIGKILL"):
        run_two(script, folder=tmp_path, lock=lock)


def test_a_user_error_on_every_rank_is_told_once(tmp_path: Path, lock: int, capfd):
    script = "import sys; print('emu35: a shard is missing', file=sys.stderr); sys.exit(2)"
    assert run_two(script, folder=tmp_path, lock=lock) == 2
    assert capfd.readouterr().err == "emu35: a shard is missing\n"
    assert "a shard is missing" in (tmp_path / "logs/rank1.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_every_rank_and_75_comes_back(tmp_path: Path, number: signal.Signals):
    script = (
        "import os, signal, sys, time\n"
        "for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):\n"
        "    signal.signal(s, lambda n, f: (print('got', n, file=sys.stderr), sys.exit(75)))\n"
        "open(os.environ['FOLDER'] + '/up' + os.environ['RANK'], 'w').close(); time.sleep(600)"
    )
    launcher = start_launcher(script, folder=tmp_path)
    wait_for(lambda: (tmp_path / "up0").exists() and (tmp_path / "up1").exists())
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 75
    assert errors == f"got {int(number)}\n"
    assert (tmp_path / "logs/rank1.log").read_text() == f"got {int(number)}\n"


def test_ranks_that_do_not_listen_end_with_the_signal_of_the_launcher(tmp_path: Path):
    script = (
        "import os, time; open(os.environ['FOLDER'] + '/up' + os.environ['RANK'], 'w'); "
        "time.sleep(600)"
    )
    launcher = start_launcher(script, folder=tmp_path)
    wait_for(lambda: (tmp_path / "up0").exists() and (tmp_path / "up1").exists())
    launcher.terminate()
    _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors


def test_the_folder_stays_taken_while_a_rank_of_a_killed_launcher_lives(tmp_path: Path):
    script = (
        "import os, time; print(os.getpid(), flush=True) if os.environ['RANK'] == '0' else None; "
        "time.sleep(600)"
    )
    launcher = start_launcher(script, folder=tmp_path)
    assert launcher.stdout
    rank = int(launcher.stdout.readline())
    others = [pid for pid in children_of(launcher.pid) if pid != rank]
    launcher.kill()
    launcher.wait()
    try:
        again = start_launcher("pass", folder=tmp_path)
        _, errors = again.communicate(timeout=60)
        assert re.search(r"is in use by another emu35 process \(pid \d+\)", errors)
    finally:
        for pid in (rank, *others):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_running(rank))
    again = start_launcher("pass", folder=tmp_path)
    assert again.wait(timeout=60) == 0


def children_of(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
