"""``emu35 launch status`` and ``cancel``: how a run is, and asking it to save and stop.

Both look at nothing but the run folder and, where a job was submitted, at Slurm; they import no
torch and need no configuration beyond the folder's own.
"""

import os
import shlex
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from emu35.config.io import CONFIG_FILE, read_config
from emu35.config.schema import did_you_mean
from emu35.errors import ConfigError, LaunchError
from emu35.log.jsonl import read_rows
from emu35.run.compose import compose
from emu35.run.rundir import LOGS, LockOwner, lock_owner
from emu35.run.slurm import CANCEL_FILE, Job, JobState, call, job_state, read_job

ACTIONS = ("status", "cancel")

_TWICE_SECONDS = 6.0
"""Between two signals that are meant as two: longer than what ranks take for copies of one."""
_END_SECONDS = 20.0


@dataclass(kw_only=True, slots=True, frozen=True)
class RunStatus:
    """How a run is. ``step`` is the newest one in its metrics, ``checkpoint`` the newest saved (0:
    none); ``holder`` is the process that holds its folder; ``job`` and ``state`` are Slurm's."""

    run_dir: str
    step: int
    steps: int
    checkpoint: int
    holder: str
    job: str
    state: str
    detail: str

    def lines(self) -> list[str]:
        """For people."""
        saved = f"step {self.checkpoint} saved" if self.checkpoint else "nothing saved"
        lines = [self.run_dir, f"  step {self.step}/{self.steps}, {saved}"]
        if self.job:
            detail = f" ({self.detail})" if self.detail else ""
            lines.append(f"  job {self.job}: {self.state}{detail}")
        lines.append(f"  held by {self.holder}" if self.holder else "  held by no process")
        return lines

    def plain(self) -> dict[str, object]:
        """For programs."""
        return asdict(self)


def check_action(words: Sequence[str]) -> None:
    """Refuse arguments of ``emu35 launch`` that begin with a word which is no override.

    Raises:
        ConfigError: naming the action that is meant, where one is close.
    """
    word = words[0] if words else "="
    if "=" not in word and not word.startswith("~") and word not in ACTIONS:
        raise ConfigError(
            f"`emu35 launch {word}`: {word!r} is neither {' nor '.join(ACTIONS)} nor an override "
            f"KEY=VALUE.{did_you_mean(word, ACTIONS)}"
        )


def find_run(words: Sequence[str], *, configs: Path | None, action: str = "status") -> Path:
    """The run folder that ``words`` name: its path, or the overrides the run was started with.

    ``action`` is what is to be done with it, for the messages.

    Raises:
        ConfigError: the folder is missing or holds no run, several are named, or the overrides do
            not fit.
    """
    if len(words) == 1 and ("=" not in words[0] or Path(words[0]).expanduser().is_dir()):
        run_dir = Path(words[0])
    elif any("=" not in word and not word.startswith("~") for word in words):
        raise ConfigError(
            f"`emu35 launch {action} {shlex.join(words)}`: name one run, by its folder or its "
            "overrides"
        )
    elif words:
        run_dir = Path(compose(words, configs=configs).run_dir)
    else:
        raise ConfigError(
            f"no run is named; use `emu35 launch {action} RUN_DIR`, or run_dir=RUN_DIR"
        )
    run_dir = run_dir.expanduser().absolute()
    if not (run_dir / CONFIG_FILE).is_file():
        what = "holds no run" if run_dir.is_dir() else "does not exist"
        raise ConfigError(
            f"{run_dir} {what}; name a folder that `emu35 run` or `emu35 launch` made"
        )
    return run_dir


def status(run_dir: Path) -> RunStatus:
    """How the run in ``run_dir`` is. A job that nobody here can tell about is UNKNOWN.

    Raises:
        ConfigError, LaunchError: its files cannot be read.
    """
    rows = read_rows(run_dir / "metrics.jsonl")
    job = read_job(run_dir)
    state = _state_if_known(job) if job else JobState(state="")
    holder = lock_owner(run_dir)
    return RunStatus(
        run_dir=str(run_dir),
        step=max((int(row["step"]) for row in rows if "step" in row), default=0),
        steps=read_config(run_dir).stage.steps,
        checkpoint=_newest_checkpoint(run_dir),
        holder=str(holder) if holder else "",
        job=job.id if job else "",
        state=state.state,
        detail=state.detail,
    )


def _state_if_known(job: Job) -> JobState:
    """The rest of a status is worth having on hosts without Slurm, too."""
    try:
        return job_state(job)
    except LaunchError as error:
        return JobState(state="UNKNOWN", detail=str(error))


def _newest_checkpoint(run_dir: Path) -> int:
    """By name: a checkpoint gets its name when it is complete."""
    names = (path.name for path in (run_dir / "checkpoints").glob("step_*"))
    steps = (name.removeprefix("step_") for name in names)
    return max((int(step) for step in steps if step.isdigit()), default=0)


def cancel(run_dir: Path, *, force: bool) -> str:
    """Ask the run to save and stop, or with ``force`` end it at once; returns what was done.

    Raises:
        LaunchError: nothing runs, or what runs cannot be reached from here.
    """
    job = read_job(run_dir)
    if job is not None and not (state := job_state(job)).over:
        return _cancel_job(job, state=state, run_dir=run_dir, force=force)
    holder = lock_owner(run_dir)
    if holder is None:
        ended = f"; job {job.id} is over" if job else ""
        raise LaunchError(f"nothing runs in {run_dir}{ended}, so there is nothing to cancel")
    return _cancel_process(holder, run_dir=run_dir, force=force)


def _cancel_job(job: Job, *, state: JobState, run_dir: Path, force: bool) -> str:
    # First, so that a job which is just being interrupted does not go back into the queue.
    try:
        (run_dir / CANCEL_FILE).write_text(f"{job.id}\n", encoding="ascii")
    except OSError as error:
        raise LaunchError(f"{run_dir / CANCEL_FILE} cannot be written: {error.strerror}") from None
    if force or state.waits:
        _scancel(job)
        # Slurm sends SIGTERM first, on which ranks save, and SIGKILL after its KillWait.
        lost = "; what it cannot save within seconds is lost" if state.runs else ""
        return f"job {job.id} was {state.state} and is cancelled{lost}"
    if state.state != "RUNNING":
        return f"job {job.id} is {state.state}; {_how_to_force(run_dir)}"
    _scancel(job, "--signal=USR1")
    log = run_dir / LOGS / f"slurm-{job.id}.out"
    return (
        f"job {job.id} is asked to save at the end of its step and to stop; {log} tells. "
        + _how_to_force(run_dir)
    )


def _scancel(job: Job, *options: str) -> None:
    done = call("scancel", *job.where, *options, job.id)
    if done.returncode:
        raise LaunchError(f"scancel refused job {job.id}: {done.stderr.strip()}")


def _cancel_process(holder: LockOwner, *, run_dir: Path, force: bool) -> str:
    if not holder.pid:
        raise LaunchError(
            f"{run_dir} is held by a process that did not leave its number; end it by hand"
        )
    if not holder.here:
        raise LaunchError(f"{run_dir} is held by {holder}; run this command there")
    _signal(holder, signal.SIGTERM, run_dir=run_dir)
    if not force:
        return f"{holder} is asked to save at the end of its step and to stop. " + _how_to_force(
            run_dir
        )
    if not _is_free(run_dir, seconds=_TWICE_SECONDS):
        _signal(holder, signal.SIGTERM, run_dir=run_dir)
    if not _is_free(run_dir, seconds=_END_SECONDS):
        raise LaunchError(f"{holder} still holds {run_dir}; end it with `kill -9 {holder.pid}`")
    return f"{holder} has ended"


def _signal(holder: LockOwner, number: signal.Signals, *, run_dir: Path) -> None:
    try:
        if holder.replaced:  # by a process that has nothing to do with the run
            raise ProcessLookupError
        os.kill(holder.pid, number)
    except ProcessLookupError:
        if not _is_free(run_dir, seconds=1.0):
            raise LaunchError(
                f"{run_dir} is held by ranks whose launcher ({holder}) is gone; end them by hand"
            ) from None
    except PermissionError:
        raise LaunchError(
            f"{holder} holds {run_dir} and belongs to another user; ask them to stop it"
        ) from None


def _is_free(run_dir: Path, *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while lock_owner(run_dir) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _how_to_force(run_dir: Path) -> str:
    again = f"emu35 launch cancel {shlex.quote(str(run_dir))} --force"
    return f"`{again}` ends it at once, where steps since its newest checkpoint may be lost"
