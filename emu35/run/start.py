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
from emu35.run.launch import WORKER, run_ranks, slurm_script, submit, torchrun_command
from emu35.run.preflight import check_inputs, check_named
from emu35.run.rundir import OpenRun, open_run
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
        run_stage(config, run_dir=run.path)
    return 0


def launch(config: RunConfig, *, node_rank: int, master: str | None, dry_run: bool) -> int:
    """Run where ``launch.kind`` says; with ``dry_run`` only print what would be executed.

    Raises:
        ConfigError, LaunchError: as :func:`run_here`, and when ``master`` is missing.
    """
    kind = config.launch.kind
    run_dir = Path(config.run_dir).expanduser().absolute()
    if kind is LaunchKind.local:
        if not dry_run:
            return run_here(config)
        print(f"# {config.launch.nproc} ranks, with torchrun's variables (RANK, WORLD_SIZE, ...)")
        print(shlex.join([sys.executable, "-m", WORKER, str(run_dir)]))
    elif kind is LaunchKind.slurm:
        if dry_run:
            print(slurm_script(config, run_dir=run_dir), end="")
            return 0
        check_named(config)
        with open_run(config) as run:
            _announce(run)
            print(submit(config, run_dir=run.path))
    else:
        command = _torchrun(config, run_dir=run_dir, node_rank=node_rank, master=master)
        if dry_run:
            print(shlex.join(command))
            return 0
        check_named(config)
        if node_rank == 0:
            with open_run(config) as run:
                _announce(run)
        else:
            _wait_for(run_dir / CONFIG_FILE, seconds=config.launch.timeout)
        sys.stdout.flush()
        os.execv(command[0], command)
    return 0


def _torchrun(config: RunConfig, *, run_dir: Path, node_rank: int, master: str | None) -> list[str]:
    nodes = config.launch.nodes
    if nodes > 1 and master is None:
        raise LaunchError(
            f"launch.nodes={nodes} needs to know node 0; add --master HOST:PORT, and "
            "--node-rank R on every node"
        )
    if not 0 <= node_rank < nodes:
        raise LaunchError(f"--node-rank {node_rank} is outside 0..{nodes - 1} (launch.nodes)")
    return torchrun_command(
        config, run_dir=run_dir, node_rank=str(node_rank), master=master or "127.0.0.1:29500"
    )


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
