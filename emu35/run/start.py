"""From a composed configuration to running ranks: the bodies of ``emu35 run`` and ``launch``."""

import os
import shlex
import sys
import time
from pathlib import Path

from emu35.config.io import CONFIG_FILE
from emu35.config.launch import LaunchKind
from emu35.config.root import RunConfig
from emu35.errors import ConfigError, LaunchError
from emu35.run.local_ranks import WORKER, run_ranks
from emu35.run.preflight import check_inputs, check_named
from emu35.run.rundir import OpenRun, open_run
from emu35.run.slurm import check_no_other, job_script, submit
from emu35.run.torchrun import Node, run_node, torchrun_command
from emu35.run.worker import run_stage


def run_here(config: RunConfig) -> int:
    """Run on this host: in this process, or ``launch.nproc`` local ranks; returns the exit code.

    Raises:
        ConfigError: the inputs are missing, or the run folder belongs to another configuration.
        LaunchError: the launcher is not local, the folder is in use, or a rank failed.
        Emu35Error: whatever a stage run in this process reports; Interrupted when stopped.
    """
    if config.launch.kind is not LaunchKind.local:
        raise LaunchError(
            f"launch.kind={config.launch.kind} is started by `emu35 launch`; "
            "use that, or launch=local to run on this host"
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise LaunchError(
            f"`emu35 run` starts its own ranks, but WORLD_SIZE={os.environ['WORLD_SIZE']} is set; "
            "use launch.nproc, or `emu35 launch launch=torchrun`"
        )
    check_inputs(config)
    with open_run(config) as run:
        _announce(run)
        if config.launch.nproc > 1:
            return run_ranks(config, run_dir=run.path, lock=run.lock)
        os.environ.update(config.launch.env)
        run_stage(config, run_dir=run.path)
    return 0


def launch(config: RunConfig, *, node_rank: int, master: str | None, dry_run: bool) -> int:
    """Run where ``launch.kind`` says; with ``dry_run`` only print what would be executed.

    Returns the exit code: 75 if the ranks were stopped and saved. A submitted job answers 0.

    Raises:
        ConfigError, LaunchError: as :func:`run_here`, and when ``master`` is missing.
    """
    run_dir = Path(config.run_dir).expanduser().absolute()
    match config.launch.kind:
        case LaunchKind.local:
            return _launch_local(config, run_dir=run_dir, dry_run=dry_run)
        case LaunchKind.torchrun:
            node = Node(rank=node_rank, master=master)
            return _launch_node(config, run_dir=run_dir, node=node, dry_run=dry_run)
        case LaunchKind.slurm:
            return _launch_job(config, run_dir=run_dir, dry_run=dry_run)


def _launch_local(config: RunConfig, *, run_dir: Path, dry_run: bool) -> int:
    if not dry_run:
        return run_here(config)
    print(f"# {config.launch.nproc} ranks, with torchrun's variables (RANK, WORLD_SIZE, ...)")
    print(shlex.join([sys.executable, "-m", WORKER, str(run_dir)]))
    return 0


def _launch_node(config: RunConfig, *, run_dir: Path, node: Node, dry_run: bool) -> int:
    command = torchrun_command(config, run_dir=run_dir, node=node)
    if dry_run:
        print(shlex.join(command))
        return 0
    check_named(config)
    if node.rank == 0:
        with open_run(config) as run:
            _announce(run)
    else:
        _wait_for(run_dir / CONFIG_FILE, seconds=config.launch.timeout)
    return run_node(config, run_dir=run_dir, node=node)


def _launch_job(config: RunConfig, *, run_dir: Path, dry_run: bool) -> int:
    script = job_script(config, run_dir=run_dir)
    if dry_run:
        print(script, end="")
        return 0
    check_named(config)
    check_no_other(run_dir)
    with open_run(config) as run:
        _announce(run)
        job = submit(config, run_dir=run.path)
    print(f"submitted job {job.id}; `emu35 launch status {shlex.quote(str(run_dir))}` follows it")
    return 0


def _wait_for(file: Path, *, seconds: float) -> None:
    """Node 0 writes the configuration; the folder is shared."""
    deadline = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{file} did not appear within {seconds} s; start node 0, and check that all nodes "
                "see the same run_dir"
            )
        time.sleep(0.5)


def _announce(run: OpenRun) -> None:
    print(f"{'resuming' if run.resumed else 'running'} in {run.path}", flush=True)
    for change in run.changes:
        print(f"  changed {change}", flush=True)
