"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd on loopback.

Everything lives in a folder of its own and on free ports, so that a Slurm which is installed and
running here is neither used nor disturbed. ``linuxproc`` finds a job's processes by their parents,
which needs no cgroups.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2")
COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")


def missing_here() -> str:
    """Why no cluster can be started here; empty where one can."""
    absent = [name for name in (*DAEMONS, *COMMANDS) if _program(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm and munge)"
    if os.geteuid() != 0:
        return "slurmctld and slurmd are started as root"
    return ""


@dataclass(kw_only=True, slots=True, frozen=True)
class SlurmCluster:
    """``environment`` is what Slurm's commands need to talk to this cluster."""

    folder: Path
    environment: Mapping[str, str]

    def call(self, *command: str) -> str:
        """Standard output of one of Slurm's commands."""
        done = subprocess.run(
            command,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def logs(self) -> str:
        """The ends of the daemons' logs, for a test that fails."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {f.name}\n{f.read_text(errors='replace')[-3000:]}" for f in files)


@contextmanager
def slurm_cluster(folder: Path) -> Generator[SlurmCluster]:
    """Start a cluster of two nodes in ``folder``; in the end kill its jobs, and stop it by its PID
    files."""
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    pid_files = [folder / f"{name}.pid" for name in (*(f"slurmd.{n}" for n in NODES), "slurmctld")]
    cluster = SlurmCluster(folder=folder, environment=environment)
    munge_socket = _start_munged(folder)
    try:
        (folder / "slurm.conf").write_text(_configuration(folder, munge_socket=munge_socket))
        (folder / "state").mkdir()
        # -i: there is no state to recover, and none to protect.
        _run("slurmctld", "-i", environment=environment)
        for node in NODES:
            _run("slurmd", "-N", node, environment=environment)
        _wait_until_idle(cluster)
        try:
            yield cluster
        finally:
            _end_jobs(cluster)
    finally:
        for file in (*pid_files, folder / "munged.pid"):
            _stop(file)


def _configuration(folder: Path, *, munge_socket: Path) -> str:
    host = socket.gethostname()
    controller, first, second = _free_ports(3)
    return f"""
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge_socket}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ReturnToService=2
KillWait=5
MailProg=/bin/true
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName={NODES[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1
NodeName={NODES[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _start_munged(folder: Path) -> Path:
    """Start munged with a key of its own; returns its socket."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    sock = folder / "munge.socket"
    # --force: a temporary folder may be more open than munged likes.
    _run(
        "munged",
        "--force",
        f"--key-file={key}",
        f"--socket={sock}",
        f"--pid-file={folder / 'munged.pid'}",
        f"--log-file={folder / 'munged.log'}",
        f"--seed-file={folder / 'munged.seed'}",
        "--num-threads=2",
        environment=os.environ,
    )
    return sock


def _wait_until_idle(cluster: SlurmCluster) -> None:
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        if cluster.call("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"]:
            return
        time.sleep(0.5)
    raise AssertionError(f"the nodes did not come up:\n{cluster.logs()}")


def _end_jobs(cluster: SlurmCluster) -> None:
    """Leave no job to a cluster that is about to stop: its processes would outlive the daemons."""
    limit = time.monotonic() + 60
    while jobs := cluster.call("squeue", "-h", "-o", "%A").split():
        assert time.monotonic() < limit, f"jobs {jobs} do not end:\n{cluster.logs()}"
        for options in (["--full", "--signal=KILL"], []):
            # It fails for jobs that have just ended, which the next look at the queue tells.
            subprocess.run(
                ["scancel", *options, *jobs],
                env=dict(cluster.environment),
                capture_output=True,
                check=False,
                timeout=60,
            )
        time.sleep(0.5)


def _run(name: str, *arguments: str, environment: Mapping[str, str]) -> None:
    """Start a daemon, which goes to the background by itself."""
    program = _program(name)
    assert program is not None
    subprocess.run([program, *arguments], env=dict(environment), check=True, timeout=60)


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _stop(pid_file: Path) -> None:
    try:
        pid = int(pid_file.read_text())
    except (FileNotFoundError, ValueError):
        return
    for number, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        limit = time.monotonic() + patience
        while time.monotonic() < limit and _runs(pid):
            time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A daemon whose new parent does not collect it stays as a zombie.
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return state[0] != "Z"


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
