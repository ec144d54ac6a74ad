"""A run that is killed and goes on with other ranks trains on the same stream of documents."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_language_model_runs import config, shards
from torchrun_ranks import run_ranks

from emu35.config import PretrainConfig
from emu35.config.io import read_config, write_config
from emu35.stages import pretrain

__all__ = ["shards"]
STEPS = 24


def prepare(folder: Path, *, shards: Path) -> None:
    stage = PretrainConfig(steps=STEPS, global_batch_size=4, validate_every=0)
    made = config(folder, shards=shards, stage=stage)
    made.log.every, made.checkpoint.every = 1, 4
    write_config(made, folder)


def streams(folder: Path) -> dict[int, float]:
    """Digest of everything read so far, by step."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = (json.loads(line) for line in lines if line.endswith("\n"))
    return {row["step"]: row["data/stream"] for row in found if "data/stream" in row}


def run_until_killed(folder: Path, *, ranks: int, step: int) -> None:
    """Start ranks and end them all with SIGKILL as soon as ``step`` is in the log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", "emu35.run.worker", str(folder)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 200
    try:
        while max(streams(folder), default=0) < step:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            tree = psutil.Process(process.pid)
            for each in [tree, *tree.children(recursive=True)]:
                each.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.multiproc
def test_the_stream_of_a_killed_run_goes_on_with_any_number_of_ranks(
    shards: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prepare(whole, shards=shards)
    pretrain.run(read_config(whole), run_dir=whole)
    expected = streams(whole)
    assert len(set(expected.values())) == STEPS, "every step adds to the digest"

    prepare(killed, shards=shards)
    moment = random.randint(5, STEPS - 4)  # another one each time: none may matter
    run_until_killed(killed, ranks=2, step=moment)
    before = streams(killed)
    assert STEPS not in before
    output = run_ranks(["-m", "emu35.run.worker", str(killed)], ranks=4, timeout=200)
    assert "resuming at step" in output
    assert before.items() <= expected.items(), f"killed after step {moment}"
    assert streams(killed) == expected, f"killed after step {moment}"
