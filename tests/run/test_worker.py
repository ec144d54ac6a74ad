"""The rank's own entry: exit codes, threads, and dying with its launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emu35.config.io import write_config
from emu35.errors import ConfigError
from emu35.run import worker
from emu35.run.compose import compose
from emu35.run.preflight import check_inputs


def test_a_folder_without_configuration_is_a_message(tmp_path: Path, capsys):
    assert worker.main([str(tmp_path)]) == 2
    assert "config.yaml does not exist" in capsys.readouterr().err


def test_every_stage_kind_can_be_run():
    from emu35.config import KINDS

    assert set(worker.STAGES) == set(KINDS["stage"])


@pytest.mark.parametrize(
    ("threads", "environment", "expected"), [(3, "5", 3), (0, "5", 5), (0, "", None)]
)
def test_threads(threads: int, environment: str, expected: int | None, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", environment)
    cores = len(os.sched_getaffinity(0))
    config = compose([f"launch.threads={threads}", "launch.nproc=2"])
    assert worker.threads_per_rank(config) == (expected or max(1, cores // 2))


def test_a_rank_dies_with_its_launcher(tmp_path: Path):
    write_config(compose([]), tmp_path)
    rank = (
        "import os, sys, time; from emu35.run import worker; "
        "worker.end_with(int(os.environ['EMU35_LAUNCHER_PID'])); "
        "print(os.getpid(), flush=True); time.sleep(600)"
    )
    launcher = (
        "import os, subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {rank!r}], "
        "env={**os.environ, 'EMU35_LAUNCHER_PID': str(os.getpid())})"
    )
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_missing_inputs_are_all_named_before_anything_starts(tmp_path: Path):
    config = compose(
        [
            f"data.sources.a.path={tmp_path}/a",
            f"data.sources.b.path={tmp_path}",
            f"data.validation.v.path={tmp_path}/v",
            f"stage.init_from={tmp_path}/origin",
        ]
    )
    with pytest.raises(ConfigError) as caught:
        check_inputs(config)
    named = [problem.split("=")[0] for problem in caught.value.problems]
    assert named == ["data.sources.a.path", "data.validation.v.path", "stage.init_from"]
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        check_inputs(compose([]))
