"""torchrun and Slurm: the commands and scripts that other launchers execute, and their values."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from emu35.cli import main
from emu35.config.io import read_config
from emu35.config.launch import limit_seconds
from emu35.errors import ConfigError
from emu35.run.compose import compose
from emu35.run.slurm import JobState


def out_of(capsys, *arguments: str) -> str:
    assert main(["launch", *arguments]) == 0
    return capsys.readouterr().out


TWO_NODES = ("launch.nodes=2", "launch.nproc=8", "stage.global_batch_size=16")
JOB = ("launch=slurm", *TWO_NODES)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], {"--node-rank=1", "--master-addr=host0", "--master-port=1234", "--max-restarts=0"}),
        (
            ["launch.rendezvous=c10d", "launch.rendezvous_id=mine", "launch.max_restarts=2"],
            {
                "--rdzv-backend=c10d",
                "--rdzv-endpoint=host0:1234",
                "--rdzv-id=mine",
                "--max-restarts=2",
            },
        ),
    ],
)
def test_torchrun_command_of_a_node(capsys, more: list[str], expected: set[str]):
    address = ("--node-rank", "1", "--master", "host0:1234")
    text = out_of(
        capsys, "launch=torchrun", *TWO_NODES, *more, "run_dir=/shared/run", "--dry-run", *address
    )
    words = text.split()
    assert {"--nnodes=2", "--nproc-per-node=8"} | expected < set(words)
    # torchrun's own 30 seconds from SIGTERM to SIGKILL would cut a large checkpoint off.
    assert "--shutdown-timeout=110" in words
    assert words[-2:] == ["emu35.run.torchrun_rank", "/shared/run"]


def test_an_address_of_colons_stands_in_brackets(capsys):
    words = ("launch=torchrun", *TWO_NODES, "--dry-run", "--master", "[fd00::1]:1234")
    found = shlex.split(out_of(capsys, *words))
    assert {"--master-addr=[fd00::1]", "--master-port=1234"} < set(found)


def test_nodes_meet_under_one_name_and_runs_under_different_ones(capsys):
    def meeting(run_dir: str, rank: str) -> str:
        text = out_of(
            capsys,
            "launch=torchrun",
            *TWO_NODES,
            f"run_dir={run_dir}",
            *("--dry-run", "--master", "host0:1234", "--node-rank", rank),
        )
        (word,) = re.findall(r"--rdzv-id=\S+", text)
        return word

    assert meeting("/shared/a", "0") == meeting("/shared/a", "1") != meeting("/shared/b", "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch.nodes=2", "stage.global_batch_size=16"], "add --master HOST:PORT"),
        (["--node-rank", "3"], "--node-rank 3 is outside 0..0"),
        (["--master", "host0:port"], "--master host0:port is no HOST:PORT"),
        (["--master", "host0:70000"], "--master host0:70000 is no HOST:PORT"),
        (["--master", "host0:1:2"], "--master host0:1:2 is no HOST:PORT"),
        (["--master", "host 0:1"], "--master host 0:1 is no HOST:PORT"),
    ],
)
def test_a_node_that_cannot_find_the_others(arguments: list[str], message: str, capsys):
    assert main(["launch", "launch=torchrun", "--dry-run", *arguments]) == 2
    assert message in capsys.readouterr().err


def directives(script: str) -> list[str]:
    return [x.removeprefix("#SBATCH ") for x in script.splitlines() if x.startswith("#SBATCH")]


def test_job_of_a_recipe(capsys, tmp_path: Path):
    script = out_of(capsys, "experiment=emu35_34b/sft_s1", f"run_dir={tmp_path}/run", "--dry-run")
    found = directives(script)
    assert {"--nodes=64", "--ntasks-per-node=1", "--gpus-per-node=8"} < set(found)
    assert {"--requeue", "--signal=USR1@120", "--open-mode=append"} < set(found)
    assert not any(line.startswith(("--account", "--partition", "--time")) for line in found)
    assert not (tmp_path / "run").exists()


def test_job_that_says_everything(capsys):
    script = out_of(
        capsys,
        *JOB,
        "run_dir=/shared/run",
        "launch.slurm.account=vision",
        'launch.slurm.partition="a100,h100"',
        "launch.slurm.qos=long",
        "launch.slurm.time=2-00:00:00",
        "launch.slurm.gpus=4",
        "launch.slurm.cpus=96",
        "launch.slurm.save_seconds=300",
        "launch.slurm.requeue=false",
        "launch.slurm.container=nvcr.io#nvidia/pytorch:25.01-py3",
        "launch.slurm.mounts=['/data:/data:ro']",
        "launch.slurm.setup=['module load cuda']",
        "launch.slurm.options=['--mem=0']",
        'launch.env={NCCL_SOCKET_IFNAME: ib0, WORDS: "it\'s two"}',
        "--dry-run",
    )
    assert {
        "--account=vision",
        "--partition=a100,h100",
        "--qos=long",
        "--time=2-00:00:00",
        "--gpus-per-node=4",
        "--cpus-per-task=96",
        "--signal=USR1@300",
        "--no-requeue",
        "--mem=0",
    } < set(directives(script))
    lines = script.splitlines()
    assert lines.index("export NCCL_SOCKET_IFNAME=ib0") < lines.index("module load cuda")
    (srun,) = [shlex.split(line) for line in lines if line.startswith("srun")]
    assert "--cpus-per-task=96" in srun
    assert "--container-image=nvcr.io#nvidia/pytorch:25.01-py3" in srun
    assert "--container-mounts=/data:/data:ro,/shared/run:/shared/run" in srun
    assert srun[srun.index("-m") - 1] == "python3"  # this host's interpreter is not in the image
    assert "scontrol requeue" not in script
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=True)
    assert not done.stderr


def test_job_on_processors_in_another_runtime(capsys):
    script = out_of(
        capsys,
        *JOB,
        "launch.slurm.gpus=0",
        "launch.slurm.prefix=[apptainer, exec, emu35.sif]",
        "launch.slurm.python=/opt/python",
        "--dry-run",
    )
    assert "--gpus" not in script
    assert " apptainer exec emu35.sif /opt/python -m emu35.run.torchrun " in script


STAND_INS = """
scontrol() {
  if [[ $1 == requeue ]]; then
    if [[ $DURING == *"no requeue"* ]]; then return 1; fi
    echo "requeued $2"; exit 0
  fi
  if [[ $2 == hostnames ]]; then printf "$HOSTS"; else echo "Name=$3 NodeAddr=10.0.0.7 X=1"; fi
}
srun() { printf '%s\\n' "$@"; eval "$DURING"; return "$CODE"; }
SLURM_JOB_NODELIST=x SLURM_JOB_ID=20123
"""


def execute(
    script: str, *, code: int = 0, during: str = "true", hosts: str = "n0\\nn1\\n"
) -> "subprocess.CompletedProcess[str]":
    """Run the job script where srun takes no time, and ends with ``code``."""
    return subprocess.run(
        ["bash", "-c", STAND_INS + script],
        env={**os.environ, "CODE": str(code), "DURING": during, "HOSTS": hosts},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("code", "during", "requeued"),
    [
        (75, 'mkdir -p "$run/checkpoints/step_00000007"', True),
        (75, "true", False),  # nothing was saved: it would go round for ever
        (75, 'mkdir -p "$run/checkpoints/step_00000007"; touch "$run/cancelled"', False),
        (75, 'mkdir -p "$run/checkpoints/step_00000007"  # no requeue', False),
        (1, 'mkdir -p "$run/checkpoints/step_00000007"', False),
        (0, "true", False),
    ],
)
def test_what_the_job_script_does_in_the_end(
    capsys, tmp_path: Path, code: int, during: str, requeued: bool
):
    run = tmp_path / "a run's folder"
    (run / "checkpoints" / "step_00000003").mkdir(parents=True)
    script = out_of(capsys, *JOB, f"run_dir={run}", "--dry-run")
    done = execute(script, code=code, during=during)
    words = done.stdout.splitlines()
    assert words[words.index("--master") + 1] == "10.0.0.7:10123"
    assert words[words.index("emu35.run.torchrun") + 1] == str(run)
    assert ("requeued 20123" in words) is requeued, done.stderr
    assert done.returncode == (0 if requeued else code)
    refused = "did not requeue this job; submit it again" in done.stderr
    assert refused is ("no requeue" in during)


def test_a_cancel_before_the_ranks_start_is_kept(capsys, tmp_path: Path):
    (tmp_path / "cancelled").touch()
    done = execute(out_of(capsys, *JOB, f"run_dir={tmp_path}", "--dry-run"))
    assert "cancelled before the ranks started" in done.stderr
    assert (done.returncode, done.stdout) == (75, "")


def test_strict_setup_lines_do_not_end_a_first_start(capsys, tmp_path: Path):
    strict = "launch.slurm.setup=['set -euo pipefail']"
    script = out_of(capsys, *JOB, strict, f"run_dir={tmp_path}/run", "--dry-run")
    assert "emu35.run.torchrun" in execute(script).stdout
    done = execute(script, hosts="")
    assert "scontrol did not say where the first node" in done.stderr
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize(
    ("state", "over"), [("COMPLETED", True), ("GONE", True), ("RESIZING", False), ("NEW", False)]
)
def test_only_final_states_are_over(state: str, over: bool):
    assert JobState(state=state).over is over


def test_a_folder_that_cannot_be_mounted(capsys):
    words = ["launch.slurm.container=image", "run_dir=/shared/a:b", "--dry-run"]
    assert main(["launch", *JOB, *words]) == 2
    assert "run_dir=/shared/a:b cannot be mounted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [("name", "'two\nlines'"), ("name", "'a\"quote'"), ("run_dir", "'/shared/two\nlines'")],
)
def test_a_name_that_would_break_the_script(capsys, key: str, value: str):
    assert main(["launch", *JOB, f"{key}={value}", "--dry-run"]) == 2
    assert f"{key}=" in (message := capsys.readouterr().err)
    assert "cannot stand in a job script" in message


def test_slurm_submission_prepares_the_folder(capsys, tmp_path: Path, monkeypatch):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\ntest -f "$2" && echo "17;west"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    run = tmp_path / "run"
    text = out_of(capsys, "launch=slurm", f"run_dir={run}", "data.sources.x.path=/shared/x")
    assert "submitted job 17;" in text
    assert read_config(run).launch.kind == "slurm"
    assert '"id": "17", "cluster": "west"' in (run / "slurm_job.json").read_text()


def test_without_sbatch_the_script_is_left_for_another_host(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["launch=slurm", f"run_dir={tmp_path}/run", "data.sources.x.path=/shared/x"]
    assert main(["launch", *words]) == 2
    assert f"submit {tmp_path}/run/launch.sh where it is" in capsys.readouterr().err
    assert (tmp_path / "run" / "launch.sh").read_text().startswith("#!/bin/bash\n")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("launch.slurm.time=1 day", "launch.slurm.time='1 day' is no time limit"),
        ("launch.slurm.time=2", "launch.slurm.time=2 ends before a run could begin"),
        ("launch.slurm.partition='a b'", "launch.slurm.partition='a b' is no name"),
        ("launch.slurm.mounts=['/a:/b']", "belongs to launch.slurm.container"),
        ("launch.slurm.container='a b'", "launch.slurm.container='a b' is no image"),
        ("launch.slurm.options=['mem=0']", "'mem=0' is no option of sbatch"),
        ("launch.slurm.setup=['a\nb']", "must be one line of visible text"),
        ("launch.slurm.gpus=-2", "launch.slurm.gpus=-2 is too small"),
        ("launch.env={A-B: x}", "'A-B' is no name of a variable"),
        ("launch.env={RANK: '0'}", "launch.env.RANK is set by the launcher"),
        ("launch.env={HF_TOKEN: hf_x}", "export it in the shell that launches"),
        ("launch.env={wandb_api_key: x}", "launch.env.wandb_api_key would be written"),
        ("launch.env={A: 'x\ny'}", "must be one line of visible text"),
        ("launch.rendezvous_id='a b'", "launch.rendezvous_id='a b' is no name"),
        ("launch.max_restarts=1", "local ranks are not started again"),
        ("launch.nodes=2", "use launch=torchrun or slurm"),
    ],
)
def test_values_that_cannot_be_launched(override: str, message: str):
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert message in str(caught.value)


def test_restarts_of_several_nodes_need_a_meeting_before_each():
    words = ["launch=torchrun", *TWO_NODES, "launch.max_restarts=1"]
    with pytest.raises(ConfigError, match=r"needs launch\.rendezvous=c10d"):
        compose(words)
    assert compose([*words, "launch.rendezvous=c10d"]).launch.max_restarts == 1


def test_mounts_are_pairs_and_one_container_is_enough():
    values = ("container=image", "mounts=['data:/data']", "prefix=[apptainer]")
    with pytest.raises(ConfigError) as caught:
        compose([f"launch.slurm.{value}" for value in values])
    assert "'data:/data' must be /SRC:/DST" in str(caught.value)
    assert "two ways into a container" in str(caught.value)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:00:10", 3610),
        ("2-03", 183600),
        ("2-03:04", 183840),
        ("2-03:04:05", 183845),
        ("UNLIMITED", None),
        ("1:2:3:4", None),
    ],
)
def test_slurm_times(time: str, seconds: int | None):
    assert limit_seconds(time) == seconds


def test_run_refuses_what_is_for_launch(capsys, tmp_path: Path):
    assert main(["run", "launch=slurm", f"run_dir={tmp_path}/run"]) == 2
    assert "`emu35 launch`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
