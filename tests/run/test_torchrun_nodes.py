"""Two torchrun agents on loopback train the two ranks of a tiny model, as two nodes would."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_run import newest_step, overrides, rows

from emu35.run.follow import status

pytestmark = [pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS, BATCH = 30, 16
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def emu35(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "emu35", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def shards(fruit_shards: Path) -> Path:
    return fruit_shards


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The metrics of two local ranks that nobody interrupted."""
    run_dir = tmp_path_factory.mktemp("local") / "run"
    words = overrides(run_dir, shards=shards, steps=STEPS, batch=BATCH)
    process = emu35("run", "launch.nproc=2", *words)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert len(rows(run_dir)) == STEPS
    return rows(run_dir)


class Nodes:
    """Both nodes of a run, started together."""

    def __init__(self, words: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            master = f"127.0.0.1:{probe.getsockname()[1]}"
        common = ["launch", "launch=torchrun", "launch.nodes=2", "launch.nproc=1", *words]
        self.processes = [
            emu35(*common, "--node-rank", str(rank), "--master", master) for rank in (0, 1)
        ]

    def end(self) -> list[tuple[int, str]]:
        """Exit code and output of both."""
        outputs = [process.communicate(timeout=600)[0] for process in self.processes]
        codes = [process.returncode for process in self.processes]
        return list(zip(codes, outputs, strict=True))

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.communicate()


@pytest.fixture
def start():
    started: list[Nodes] = []

    def start_nodes(words: list[str]) -> Nodes:
        started.append(Nodes(words))
        return started[-1]

    yield start_nodes
    for nodes in started:
        nodes.kill()


def wait_for_step(run_dir: Path, step: int, nodes: Nodes) -> None:
    deadline = time.monotonic() + 600
    while newest_step(run_dir) < step:
        ended = [p.returncode for p in nodes.processes if p.poll() is not None]
        assert not ended, nodes.end()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_stopped_on_one_node_saved_by_both_and_resumed(
    tmp_path: Path, shards: Path, reference: list[dict[str, float]], start
) -> None:
    run_dir = tmp_path / "run"
    words = overrides(run_dir, shards=shards, steps=STEPS, batch=BATCH)
    nodes = start(words)
    wait_for_step(run_dir, 3, nodes)
    assert status(run_dir).holder == f"pid {nodes.processes[0].pid}"
    nodes.processes[1].send_signal(signal.SIGTERM)
    ends = nodes.end()
    assert [code for code, _ in ends] == [75, 75], ends
    stopped = status(run_dir)
    assert 3 <= stopped.step == stopped.checkpoint < STEPS
    assert not stopped.holder

    ends = start(words).end()
    assert [code for code, _ in ends] == [0, 0], ends
    assert f"resuming at step {stopped.step}/{STEPS}" in ends[0][1]
    assert rows(run_dir) == reference


def test_a_killed_rank_restarts_both_nodes_from_the_newest_checkpoint(
    tmp_path: Path, shards: Path, reference: list[dict[str, float]], start
) -> None:
    run_dir = tmp_path / "run"
    words = overrides(run_dir, shards=shards, steps=STEPS, batch=BATCH)
    more = ["launch.max_restarts=1", "launch.rendezvous=c10d", "checkpoint.every=5"]
    nodes = start([word for word in words if word != "checkpoint.every=0"] + more)
    wait_for_step(run_dir, 7, nodes)
    torchrun = psutil.Process(nodes.processes[1].pid).children()[0]
    torchrun.children()[0].kill()
    ends = nodes.end()
    assert [code for code, _ in ends] == [0, 0], ends
    output = "".join(text for _, text in ends)
    assert "training 30 steps from the beginning" in output
    assert "resuming at step" in output
    assert rows(run_dir) == reference
