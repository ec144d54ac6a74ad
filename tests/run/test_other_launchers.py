"""torchrun and Slurm: the commands and scripts that other launchers execute."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from emu35.cli import main
from emu35.config.io import read_config


def out_of(capsys, *arguments: str) -> str:
    assert main(["launch", *arguments]) == 0
    return capsys.readouterr().out


def test_torchrun_command_of_a_node(capsys):
    text = out_of(
        capsys,
        "launch=torchrun",
        "launch.nodes=2",
        "stage.global_batch_size=16",
        "run_dir=/shared/run",
        "--dry-run",
        "--node-rank",
        "1",
        "--master",
        "host0:1234",
    )
    words = text.split()
    assert {"--nnodes=2", "--nproc-per-node=8", "--node-rank=1"} < set(words)
    assert {"--master-addr=host0", "--master-port=1234"} < set(words)
    # torchrun's own 30 seconds from SIGTERM to SIGKILL would cut a large checkpoint off.
    assert "--shutdown-timeout=110" in words
    assert words[-2:] == ["emu35.run.worker", "/shared/run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch.nodes=2", "stage.global_batch_size=16"], "add --master HOST:PORT"),
        (["--node-rank", "3"], "--node-rank 3 is outside 0..0"),
    ],
)
def test_a_node_that_cannot_find_the_others(arguments: list[str], message: str, capsys):
    assert main(["launch", "launch=torchrun", "--dry-run", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_slurm_script_is_one_job_of_one_torchrun_a_node(capsys, tmp_path: Path):
    script = out_of(
        capsys, "experiment=emu35_34b/sft_s1", f"run_dir={tmp_path}/a run's folder", "--dry-run"
    )
    assert "#SBATCH --nodes=64\n" in script
    assert "#SBATCH --gpus-per-node=8\n" in script
    assert not (tmp_path / "a run's folder").exists()
    # What the shell would execute, with stand-ins for Slurm's and torchrun's commands.
    stand_ins = (
        "set +e; scontrol() { printf 'n0\\nn1\\n'; }; SLURM_JOB_NODELIST=x\n"
        'srun() { shift; SLURM_NODEID=5 "$@"; }\n'
    )
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    text = stand_ins + script.replace(sys.executable, str(fake))
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert "--node-rank=5" in words
    assert "--master-addr=n0" in words
    assert words[-1] == f"{tmp_path}/a run's folder"


def test_slurm_submission_prepares_the_folder(capsys, tmp_path: Path, monkeypatch):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\necho "Submitted $1"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    run = tmp_path / "run"
    text = out_of(capsys, "launch=slurm", f"run_dir={run}", "data.sources.x.path=/shared/x")
    assert f"Submitted {run}/launch.sh" in text
    assert read_config(run).launch.kind == "slurm"


def test_run_refuses_what_is_for_launch(capsys, tmp_path: Path):
    assert main(["run", "launch=slurm", f"run_dir={tmp_path}/run"]) == 2
    assert "`emu35 launch`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
