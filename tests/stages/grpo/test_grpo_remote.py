"""Training whose answers come from a server: a process of its own that is told the weights."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from learning import configure, learn, rows

from emu35.errors import LaunchError
from emu35.stages.grpo.archive import read_groups


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(start: Path) -> Iterator[str]:
    """``emu35 serve`` of the weights that runs start from."""
    port = free_port()
    words = ["serve", "--run", str(start), "--port", str(port), "--precision", "fp32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "emu35", *words, "--weight-updates"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


@pytest.mark.multiproc
def test_a_server_answers_as_the_trainer_would(server: str, start: Path, tmp_path: Path) -> None:
    """The same answers, scores and updates; the server has the new weights at every step."""
    remote = {"engine": "remote", "servers": [server], "timeout": 60.0, "bucket_bytes": 5000}
    learn(configure(tmp_path / "remote", start=start, stage={"rollout": remote}))
    learn(configure(tmp_path / "embedded", start=start))
    for step in range(1, 5):
        for a, b in zip(
            read_groups(tmp_path / "remote" / "rollouts", step=step),
            read_groups(tmp_path / "embedded" / "rollouts", step=step),
            strict=True,
        ):
            for one, other in zip(a.rollouts, b.rollouts, strict=True):
                np.testing.assert_array_equal(one.ids, other.ids)
                np.testing.assert_array_equal(one.kinds, other.kinds)
                np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    found, wanted = rows(tmp_path / "remote"), rows(tmp_path / "embedded")
    for step, row in found.items():
        assert row["drift/largest"] < 1e-4
        assert row["engine/answered"] == 12
        assert row["engine/update_s"] > 0
        assert "engine/timeouts" not in row
        assert row["reward"] == wanted[step]["reward"]
        assert row["grad_norm"] == pytest.approx(wanted[step]["grad_norm"], rel=1e-3)


def test_no_server_ends_the_run(start: Path, tmp_path: Path) -> None:
    remote = {"engine": "remote", "servers": [f"http://127.0.0.1:{free_port()}"], "timeout": 5.0}
    with pytest.raises(LaunchError, match="no rollout server took"):
        learn(configure(tmp_path / "run", start=start, stage={"rollout": remote}))


def test_only_remote_rollouts_need_the_extra_package() -> None:
    """What a run without servers imports is there without ``emu35[grpo]``."""
    program = "import sys; sys.modules['httpx'] = None; import emu35.stages.grpo.stage"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
