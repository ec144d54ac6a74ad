"""A command in several ranks. The ranks are real processes; what they do is a line or two."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.multiproc

ALAS = """
if rank:
    print('alas')
    1 / 0
up1 = Path("up1")
while not up1.exists() or Path(f"/proc/{up1.read_text() or 'self'}/cwd").exists():
    time.sleep(0.002)
"""
"""Rank 1 fails; rank 0 goes on when it has."""

KILLED = ALAS.replace("1 / 0", "os.kill(os.getpid(), signal.SIGKILL)")

ENTRY = """
import os, signal, sys, time
from pathlib import Path
from emu35.errors import ConfigError, Emu35Error
from emu35.run.tp import in_ranks
from emu35.run.worker import end_rank, tell

def wait():
    while True:
        time.sleep(0.02)

def command():
    code = in_ranks(int(sys.argv[1]), command=[sys.executable, *sys.argv])
    if code is not None:
        return code
    rank = int(os.environ.get("RANK", "0"))
    Path(f"up{{rank}}").write_text(str(os.getpid()))
{body}
    return 0

def main():
    try:
        return command()
    except Emu35Error as error:
        return tell(error)

end_rank(main)
"""


@pytest.fixture
def start(tmp_path: Path):
    """Start a command that runs ``body`` on every rank; whatever is left is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start_command(body: str, *, tp: int = 2, **variables: str) -> "subprocess.Popen[str]":
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        (tmp_path / "entry.py").write_text(ENTRY.format(body=lines))
        ours = {name: text for name, text in os.environ.items() if name != "OMP_NUM_THREADS"}
        process = subprocess.Popen(
            [sys.executable, "entry.py", str(tp)],
            cwd=tmp_path,
            env={**ours, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_command
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.communicate()


Start = Callable[..., "subprocess.Popen[str]"]


def wait_for(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def pids(folder: Path) -> list[int]:
    """The process of every rank, once both are at work."""
    files = [folder / "up0", folder / "up1"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def test_rank_0_has_the_terminal_and_cores_are_shared_out(start: Start, tmp_path: Path) -> None:
    body = """
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
said = " ".join([*(os.environ[name] for name in names), sys.stdin.read() or "nothing"])
Path(f"said{rank}").write_text(said)
print(said)
print("progress of", rank, file=sys.stderr)
"""
    output, errors = start(body).communicate("typed", timeout=60)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert output == f"0 2 0 {share} lo typed\n"
    assert errors == "progress of 0\n"
    assert (tmp_path / "said1").read_text() == f"1 2 1 {share} lo nothing"


def test_one_rank_is_this_process(start: Start) -> None:
    process = start("print(os.getpid(), 'WORLD_SIZE' in os.environ)", tp=1)
    assert process.communicate(timeout=60)[0] == f"{process.pid} False\n"


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("return 7", 7, ""),
        ("raise ConfigError('both say so')", 2, "emu35: both say so"),
        ("if rank == 0:\n    raise ConfigError('no')\nwait()", 2, "emu35: no"),
        ("if rank == 0:\n    1 / 0\nwait()", 1, "ZeroDivisionError"),
        ("if rank == 0:\n    os.kill(os.getpid(), signal.SIGKILL)\nwait()", 137, ""),
        # What rank 0 does then, it does because the other has gone, be it much later or at once.
        (f"{ALAS}\ntime.sleep(0.5)\nsys.exit(1)", 2, "rank 1 ended with exit code 1"),
        (f"{ALAS}\nsys.exit(1)", 2, "rank 1 ended with exit code 1"),
        (f"{KILLED}\nsys.exit(1)", 2, "rank 1 was killed by SIGKILL"),
        # Whoever waits for rank 0 in a collective fails, or waits for ever, when it has ended.
        ("if rank:\n    wait()", 0, ""),
        ("if rank:\n    sys.exit(3)\ntime.sleep(1)", 0, ""),
    ],
)
def test_the_exit_code_is_that_of_rank_0_and_nobody_stays(
    start: Start, tmp_path: Path, body: str, code: int, words: str
) -> None:
    process = start(body)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert words in errors
    if ALAS in body:
        assert "ZeroDivisionError" in errors, "the log of the rank that failed"
        assert "alas" in errors
    ranks = [file.read_text() for file in tmp_path.glob("up?")]
    assert not any(psutil.pid_exists(int(rank)) for rank in ranks if rank)


def test_ctrl_c_ends_all_at_once(start: Start, tmp_path: Path) -> None:
    process = start("wait()")
    ranks = pids(tmp_path)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - began < 4
    assert not any(map(psutil.pid_exists, ranks))


def test_a_request_to_stop_reaches_rank_0_alone(start: Start, tmp_path: Path) -> None:
    body = """
if rank == 0:
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    Path("listening").touch()
    while not asked:
        time.sleep(0.02)
    time.sleep(1)
    print("the other one:", "runs" if Path("alive1").exists() else "gone", flush=True)
    Path("done").touch()
else:
    Path("alive1").touch()
    while not Path("done").exists():
        time.sleep(0.02)
    Path("followed").touch()
"""
    process = start(body)
    pids(tmp_path)
    wait_for((tmp_path / "listening").exists)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "the other one: runs\n"), errors
    assert (tmp_path / "followed").exists()


def test_ranks_die_with_whoever_started_them(start: Start, tmp_path: Path) -> None:
    process = start("wait()")
    ranks = pids(tmp_path)
    process.kill()
    wait_for(lambda: not any(map(psutil.pid_exists, ranks)), seconds=10)


def test_another_number_of_ranks_is_refused(start: Start) -> None:
    for tp, variables, words in (
        (2, {"WORLD_SIZE": "4"}, "tp=2, but 4 ranks were started"),
        (1, {"WORLD_SIZE": "2"}, "tp=1, but 2 ranks were started"),
        (0, {}, "tp=0 is no number of ranks; use 1 or more"),
    ):
        process = start("return 0", tp=tp, **variables)
        assert words in process.communicate(timeout=60)[1]
        assert process.returncode == 2


@pytest.mark.slow
def test_ranks_find_each_other(start: Start) -> None:
    body = """
import torch
from emu35.parallel.mesh import inference_mesh, leave
mesh = inference_mesh(tp=2)
sum_ = torch.ones(3) * (rank + 1)
torch.distributed.all_reduce(sum_, group=mesh.tp_group)
print(mesh.tp_rank, mesh.tp_size, sum_.tolist(), flush=True)
leave()
"""
    process = start(body)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.splitlines()[-1] == "0 2 [3.0, 3.0, 3.0]"
