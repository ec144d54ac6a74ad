"""A run as one Slurm job: the script, its submission, and what Slurm says about it later.

The script starts one ``python -m emu35.run.torchrun`` a node with srun. Before the time limit Slurm
sends SIGUSR1 to every process of that step (``--signal`` without ``B:``, which would reach the
batch shell alone); see :mod:`emu35.run.torchrun` for how each of them takes it. The ranks save, all
nodes answer 75, and the script puts its own job back into the queue, unless ``emu35 launch cancel``
asked for the stop or nothing was saved since the job began (it would go round for ever).

The run folder must be visible to all nodes under the same path.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from emu35.config.root import RunConfig
from emu35.errors import ConfigError, Interrupted, LaunchError
from emu35.run.rundir import LOGS

SCRIPT_FILE = "launch.sh"
JOB_FILE = "slurm_job.json"
CANCEL_FILE = "cancelled"
"""Its presence in a run folder tells the job script not to start the ranks, and not to go back into
the queue."""
GONE = "GONE"
"""The state of a job of which Slurm knows nothing any more; it ended some time ago."""

_CALL_SECONDS = 60
_STRAGGLER_SECONDS = 60
"""How long the other nodes may go on when the first one has ended, whatever the reason."""
_FIRST_PORT, _PORTS = 10000, 20000
_FINAL = frozenset(
    (
        *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY"),
        *("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED"),
    )
)
"""Slurm's states of jobs that do nothing any more."""

_SCRIPT = r"""#!/bin/bash
{directives}

set -e
{exports}{setup}run={run}
newest() {{
  find "$run/checkpoints" -maxdepth 1 -name 'step_*' 2>/dev/null | sort | tail -n 1 || true
}}
before=$(newest)
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || true
master=$(scontrol show node "${{first:-}}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') || true
if [[ -z ${{first:-}} || -z $master ]]; then
  echo "emu35: scontrol did not say where the first node of this job is; submit it again" >&2
  exit 1
fi
port=$(({first_port} + SLURM_JOB_ID % {ports}))  # below those that Linux gives to anybody
if [[ -e "$run/{cancelled}" ]]; then
  echo "emu35: cancelled before the ranks started; submit the run again to go on" >&2
  exit {interrupted}
fi
code=0
{srun} || code=$?
"""

_REQUEUE = """\
if [[ $code -eq {interrupted} && ! -e "$run/{cancelled}" ]]; then
  if [[ "$(newest)" == "$before" ]]; then
    echo "emu35: stopped before a step was saved; the job is not put back into the queue" >&2
  else
    echo "emu35: interrupted and saved; the job is to go back into the queue"
    if scontrol requeue "$SLURM_JOB_ID"; then
      sleep 60  # Slurm ends this script
    else
      echo "emu35: Slurm did not requeue this job; submit it again" >&2
    fi
  fi
fi
"""


@dataclass(kw_only=True, slots=True, frozen=True)
class Job:
    """A submitted job: its ``id``, the ``cluster`` if sbatch named one, the time of submission."""

    id: str
    cluster: str = ""
    submitted: str = ""

    @property
    def where(self) -> list[str]:
        """The option that tells Slurm's commands which cluster is meant."""
        return [f"--clusters={self.cluster}"] if self.cluster else []


@dataclass(kw_only=True, slots=True, frozen=True)
class JobState:
    """What Slurm says about a job. ``state`` is Slurm's word, or :data:`GONE` if it knows no more;
    ``detail`` are the facts that go with it, in words."""

    state: str
    detail: str = ""

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    @property
    def runs(self) -> bool:
        return self.state in ("RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED")

    @property
    def over(self) -> bool:
        """Only in a state that is known to be final: a word that is not known may be a job that
        lives, and a second one in its folder would do harm."""
        return self.state in _FINAL or self.state == GONE


def job_script(config: RunConfig, *, run_dir: Path) -> str:
    """The script for sbatch.

    Raises:
        ConfigError: the name or the folder of the run cannot stand in a job script, or the folder
            cannot be mounted into the container.
    """
    launch, slurm = config.launch, config.launch.slurm
    text = _SCRIPT.format(
        directives="\n".join(f"#SBATCH {line}" for line in _directives(config, run_dir=run_dir)),
        exports="".join(
            f"export {name}={shlex.quote(value)}\n" for name, value in launch.env.items()
        ),
        setup="".join(f"{line}\n" for line in slurm.setup),
        run=shlex.quote(str(run_dir)),
        srun=_srun(config, run_dir=run_dir),
        first_port=_FIRST_PORT,
        ports=_PORTS,
        cancelled=CANCEL_FILE,
        interrupted=Interrupted.exit_code,
    )
    if slurm.requeue:
        text += _REQUEUE.format(interrupted=Interrupted.exit_code, cancelled=CANCEL_FILE)
    return text + 'exit "$code"\n'


def _directives(config: RunConfig, *, run_dir: Path) -> list[str]:
    launch, slurm = config.launch, config.launch.slurm
    name = _directive_value("name", config.name)
    output = _directive_value("run_dir", str(run_dir)).replace("%", "%%")
    gpus = launch.nproc if slurm.gpus < 0 else slurm.gpus
    lines = [
        f'--job-name="{name}"',
        f"--nodes={launch.nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={gpus}" if gpus else "",
        f"--cpus-per-task={slurm.cpus}" if slurm.cpus else "",
        *(
            f"--{option}={value}"
            for option in ("account", "partition", "qos", "time")
            if (value := getattr(slurm, option))
        ),
        f'--output="{output}/{LOGS}/slurm-%j.out"',
        "--open-mode=append",
        f"--signal=USR1@{slurm.save_seconds}",
        "--requeue" if slurm.requeue else "--no-requeue",
        *slurm.options,
    ]
    return [line for line in lines if line]


def _directive_value(key: str, value: str) -> str:
    """``value`` between double quotes in a #SBATCH line, where nothing can be escaped."""
    if re.search(r'["\\]', value) or any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise ConfigError(
            f"{key}={value!r} cannot stand in a job script; use a name without quotes, backslashes "
            "and line ends"
        )
    return value


def _srun(config: RunConfig, *, run_dir: Path) -> str:
    slurm = config.launch.slurm
    words = [
        "srun",
        "--ntasks-per-node=1",
        # Nodes that were stopped and saved end one after another, each with 75.
        "--kill-on-bad-exit=0",
        f"--wait={_STRAGGLER_SECONDS}",
    ]
    if slurm.cpus:
        words.append(f"--cpus-per-task={slurm.cpus}")  # srun does not take it from the job
    if slurm.container:
        if re.search(r"[:,]", str(run_dir)):
            raise ConfigError(
                f"run_dir={run_dir} cannot be mounted into launch.slurm.container, where ':' and "
                "',' separate mounts; use a folder without them"
            )
        mounts = [*slurm.mounts, f"{run_dir}:{run_dir}"]
        words += [
            f"--container-image={slurm.container}",
            f"--container-mounts={','.join(mounts)}",
        ]
    python = slurm.python or ("python3" if slurm.container else sys.executable)
    words += [*slurm.prefix, python, "-m", "emu35.run.torchrun", str(run_dir)]
    return shlex.join(words) + (
        ' --master "$master:$port" --id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"'
    )


def submit(config: RunConfig, *, run_dir: Path) -> Job:
    """Write the job script into the run folder, submit it, and remember the job there.

    Raises:
        LaunchError: an earlier job of the run is not over, sbatch is not on this host, or it
            refuses the job.
        ConfigError: see :func:`job_script`.
    """
    text = job_script(config, run_dir=run_dir)
    script = run_dir / SCRIPT_FILE
    try:
        (run_dir / LOGS).mkdir(exist_ok=True)
        script.write_text(text, encoding="utf-8")
        (run_dir / CANCEL_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise LaunchError(f"{script} cannot be written: {error.strerror}; free space") from None
    if shutil.which("sbatch") is None:
        raise LaunchError(f"sbatch is not on this host; submit {script} where it is")
    done = call("sbatch", "--parsable", str(script))
    if done.returncode:
        raise LaunchError(f"sbatch refused {script}: {done.stderr.strip()}")
    number, _, cluster = done.stdout.strip().splitlines()[-1].partition(";")
    job = Job(id=number, cluster=cluster, submitted=time.strftime("%Y-%m-%dT%H:%M:%S"))
    (run_dir / JOB_FILE).write_text(json.dumps(asdict(job)) + "\n", encoding="utf-8")
    return job


def check_no_other(run_dir: Path) -> None:
    """Refuse a second job for a run whose first one waits or runs.

    Raises:
        LaunchError: naming that job and what to do with it.
    """
    job = read_job(run_dir)
    if job is None or shutil.which("scontrol") is None:
        return
    state = job_state(job)
    if not state.over:
        raise LaunchError(
            f"job {job.id} of {run_dir} is {state.state}; wait for it, or end it with "
            f"`emu35 launch cancel {shlex.quote(str(run_dir))}`"
        )


def read_job(run_dir: Path) -> Job | None:
    """The job that was submitted for the run; None if there was none.

    Raises:
        LaunchError: the file that remembers it is damaged.
    """
    file = run_dir / JOB_FILE
    try:
        return Job(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise LaunchError(
            f"{file} cannot be read ({error}); look for the job with squeue"
        ) from None


def job_state(job: Job) -> JobState:
    """Ask Slurm, first the controller and, when it has forgotten, the accounting.

    Raises:
        LaunchError: Slurm's commands are not on this host, or the controller does not answer.
    """
    done = call("scontrol", *job.where, "--oneliner", "show", "job", job.id)
    if done.returncode == 0 and "JobState=" in done.stdout:
        return _controller_state(done.stdout)
    if "Invalid job id" not in done.stderr:
        raise LaunchError(f"scontrol could not say how job {job.id} is: {done.stderr.strip()}")
    if shutil.which("sacct") is not None:
        done = call("sacct", *job.where, "-n", "-X", "-P", "-j", job.id, "-o", "State,ExitCode,End")
        lines = done.stdout.strip().splitlines()
        if done.returncode == 0 and lines:
            state, code, end = lines[-1].split("|")
            return JobState(state=state.split()[0], detail=f"exit code {code}, ended {end}")
    return JobState(state=GONE, detail="Slurm remembers no such job; it ended some time ago")


def _controller_state(line: str) -> JobState:
    facts = dict(re.findall(r"(\w+)=(\S*)", line))
    state = facts["JobState"]
    details: list[str] = []
    if facts.get("NodeList") not in (None, "", "(null)"):
        details.append(f"on {facts['NodeList']}")
    if state == "RUNNING":
        details.append(f"for {facts['RunTime']} of {facts['TimeLimit']}")
    elif state == "PENDING":
        details.append(f"reason {facts['Reason']}, start {facts['StartTime']}")
    elif facts.get("EndTime", "Unknown") != "Unknown":
        details.append(f"exit code {facts['ExitCode']}, ended {facts['EndTime']}")
    if facts.get("Restarts", "0") != "0":
        details.append(f"restarts {facts['Restarts']}")
    return JobState(state=state, detail=", ".join(details))


def call(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run one of Slurm's commands.

    Raises:
        LaunchError: it is not on this host, or does not answer.
    """
    program = shutil.which(name)
    if program is None:
        raise LaunchError(f"{name} is not on this host; ask on a login node of the cluster")
    try:
        return subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_CALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{name} gave no answer within {_CALL_SECONDS} s; is the cluster's controller up?"
        ) from None
