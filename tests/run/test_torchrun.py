"""One node under a real torchrun. The ranks are real but for their stage, which trains nothing."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.multiproc

RANK = """
import os, signal, sys, time
from pathlib import Path
from emu35.errors import DataError, Interrupted
from emu35.run import torchrun_rank, worker

def attempt():
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def up(run_dir):
    Path(run_dir, f"up{{os.environ['RANK']}}.{{attempt()}}").write_text(str(os.getpid()))

def train(run_dir):
    heard = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, frame: heard.append(n))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    up(run_dir)
    while not heard:
        time.sleep(0.02)
    raise Interrupted(f"rank {{os.environ['RANK']}} saved after {{signal.Signals(heard[0]).name}}")

def stage(config, run_dir):
    rank = int(os.environ["RANK"])
{body}

worker.STAGES = dict.fromkeys(worker.STAGES, stage)
worker.end_rank(torchrun_rank.main)
"""

LAUNCHER = """
import sys
from pathlib import Path
from emu35.config.io import write_config
from emu35.errors import Emu35Error
from emu35.run.compose import compose
from emu35.run.torchrun import Node, run_node
run_dir, node, master, *overrides = sys.argv[1:]
config = compose(["launch=torchrun", "launch.nproc=2", f"run_dir={run_dir}", *overrides])
write_config(config, run_dir)
try:
    program = [run_dir + "/rank.py", run_dir]
    node = Node(rank=int(node), master=master or None)
    sys.exit(run_node(config, run_dir=Path(run_dir), node=node, program=program))
except Emu35Error as error:
    sys.exit(f"emu35: {error}")
"""


@pytest.fixture
def start(tmp_path: Path):
    """Start two ranks whose stage is ``body``; whatever is left of them is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start_node(
        body: str, *overrides: str, node: int = 0, master: str = ""
    ) -> "subprocess.Popen[str]":
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        (tmp_path / "rank.py").write_text(RANK.format(body=lines))
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(tmp_path), str(node), master, *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_node
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.communicate()


def wait_for(condition: Callable[[], bool], *, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def are_up(folder: Path, *, attempt: int = 0) -> bool:
    return all((folder / f"up{rank}.{attempt}").exists() for rank in (0, 1))


def test_ranks_that_saved_are_answered_with_75_and_not_started_again(tmp_path: Path, start) -> None:
    node = start("train(run_dir)", "launch.max_restarts=3")
    wait_for(lambda: are_up(tmp_path))
    node.terminate()
    _, errors = node.communicate(timeout=90)
    assert node.returncode == 75, errors
    assert "rank 0 saved after SIGUSR1" in errors
    assert "rank 1 saved" not in errors  # the console is rank 0's, as with local ranks
    assert "rank 1 saved" in (tmp_path / "logs" / "rank1.log").read_text()
    assert not (tmp_path / "up0.1").exists()


def test_a_signal_to_every_process_as_slurm_sends_it(tmp_path: Path, start) -> None:
    node = start("train(run_dir)")
    wait_for(lambda: are_up(tmp_path))
    family = [node.pid, *(p.pid for p in psutil.Process(node.pid).children(recursive=True))]
    assert len(family) == 4  # this launcher, torchrun, two ranks
    for pid in family:
        os.kill(pid, signal.SIGUSR1)
    _, errors = node.communicate(timeout=90)
    assert node.returncode == 75, errors


def test_a_signal_while_ranks_start_is_kept(tmp_path: Path, start) -> None:
    node = start("up(run_dir); time.sleep(3); train(run_dir)")
    wait_for(lambda: are_up(tmp_path))
    node.send_signal(signal.SIGUSR1)
    _, errors = node.communicate(timeout=90)
    assert node.returncode == 75, errors


def test_a_killed_rank_is_started_again_and_the_ranks_find_each_other(
    tmp_path: Path, start
) -> None:
    body = (
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "one = torch.ones(1)\n"
        "dist.all_reduce(one)\n"
        "up(run_dir)\n"
        "while attempt() == 0:\n"
        "    dist.all_reduce(one)\n"
        "    time.sleep(0.05)\n"
        "assert one.item() == 2.0"
    )
    node = start(body, "launch.max_restarts=1")
    wait_for(lambda: are_up(tmp_path))
    os.kill(int((tmp_path / "up1.0").read_text()), signal.SIGKILL)
    _, errors = node.communicate(timeout=90)
    assert node.returncode == 0, errors
    assert are_up(tmp_path, attempt=1)


def test_an_error_of_the_user_is_told_once_and_not_tried_again(tmp_path: Path, start) -> None:
    # Rank 0 tells the user; torchrun would end it before that if the other were the first to fail.
    body = "up(run_dir)\nif rank: time.sleep(5)\nraise DataError('a shard is missing')"
    node = start(body, "launch.max_restarts=3")
    _, errors = node.communicate(timeout=90)
    assert node.returncode == 2
    assert errors.count("emu35: a shard is missing") == 1
    assert not (tmp_path / "up0.1").exists()


def test_a_crash_says_where_to_look(tmp_path: Path, start) -> None:
    node = start("if rank == 1: raise ValueError('a bug')\ntime.sleep(600)")
    _, errors = node.communicate(timeout=90)
    assert node.returncode == 1
    assert "rank      : 1 (local_rank: 1)" in errors
    assert f"{tmp_path}/logs/rankN.log is what rank N printed" in errors
    assert "ValueError: a bug" in (tmp_path / "logs" / "rank1.log").read_text()


def test_a_signal_while_torchrun_waits_for_another_node_undoes_nothing(
    tmp_path: Path, start
) -> None:
    body = (
        "up(run_dir)\nwhile rank == 1 and not Path(run_dir, 'go').exists():\n    time.sleep(0.05)"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{probe.getsockname()[1]}"
    words = ("launch.nodes=2", "launch.nproc=1")
    first, second = (start(body, *words, node=node, master=master) for node in (0, 1))
    wait_for(lambda: are_up(tmp_path))
    finished = int((tmp_path / "up0.0").read_text())
    wait_for(lambda: not psutil.pid_exists(finished))
    first.send_signal(signal.SIGUSR1)
    time.sleep(1.0)
    assert first.poll() is None
    (tmp_path / "go").touch()
    for node in (first, second):
        _, errors = node.communicate(timeout=90)
        assert node.returncode == 0, errors


def test_a_second_signal_ends_ranks_that_do_not_listen(tmp_path: Path, start) -> None:
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); up(run_dir); time.sleep(600)"
    node = start(body, "launch.max_restarts=3")
    wait_for(lambda: are_up(tmp_path))
    pids = [int((tmp_path / f"up{rank}.0").read_text()) for rank in (0, 1)]
    node.terminate()
    time.sleep(1.0)
    assert node.poll() is None
    node.terminate()
    _, errors = node.communicate(timeout=90)
    assert node.returncode == 128 + signal.SIGTERM, errors
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's parent-death signal")
def test_a_killed_launcher_leaves_neither_torchrun_nor_ranks(tmp_path: Path, start) -> None:
    node = start("up(run_dir); time.sleep(600)")
    wait_for(lambda: are_up(tmp_path))
    below = psutil.Process(node.pid).children(recursive=True)
    assert len(below) == 3
    node.kill()
    wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in below))


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's parent-death signal")
def test_a_launcher_killed_while_ranks_start_leaves_nobody(tmp_path: Path, start) -> None:
    node = start("up(run_dir); time.sleep(600)")
    launcher = psutil.Process(node.pid)
    below: list[psutil.Process] = []
    try:
        wait_for(lambda: len(launcher.children(recursive=True)) == 3)
        below = launcher.children(recursive=True)
        node.kill()
        wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in below))
    finally:
        for process in below:
            if process.is_running():
                process.kill()
