"""One node of a torchrun launch: torchrun as a child process, and an honest exit code.

    python -m emu35.run.torchrun RUN_DIR --node-rank R --master HOST:PORT

is what a Slurm job executes on every node; ``emu35 launch launch=torchrun`` does the same after it
has prepared the run folder.

torchrun is supervised rather than executed in our place because of three habits of it: it answers 1
for whatever exit code a rank had, it starts ranks again that only did as they were told (both:
:mod:`emu35.run.outcomes`), and a SIGUSR1 ends it. So:

* A stop signal (SIGTERM, SIGINT, SIGUSR1) to this process goes to the ranks, as SIGUSR1, and not to
  torchrun, which sees its ranks end well. Where no rank runs yet, torchrun is ended; where all
  have ended well, it waits for the other nodes and is left alone. One node is enough: the ranks
  agree among themselves to save.
* SIGUSR1 is blocked in torchrun, for Slurm signals every process of a step. Ranks inherit the block
  and lift it once they listen, so a signal that comes while they start is kept.
* A second signal ends torchrun and the ranks at once.
* Whoever is killed takes those below along (Linux): torchrun dies with this process, the ranks with
  torchrun.
"""

import argparse
import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from zlib import crc32

import psutil

from emu35.config.io import read_config
from emu35.config.launch import RendezvousKind
from emu35.config.root import RunConfig
from emu35.errors import Emu35Error, Interrupted, LaunchError
from emu35.run import outcomes
from emu35.run.local_ranks import tail
from emu35.run.rundir import LOGS
from emu35.run.worker import PR_SET_PDEATHSIG, SUPERVISOR_PID, rank_environment

RANK = "emu35.run.torchrun_rank"
SAVE_SECONDS = 110
"""From SIGTERM to SIGKILL under torchrun, whose own 30 seconds are few for a large checkpoint."""

_MASTER = re.compile(r"(?P<host>\[[^\s\[\]]+\]|[^\s:\[\]]+)(?::(?P<port>[0-9]+))?")
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_REQUEST_SECONDS = 0.5
_POLL_SECONDS = 0.1


@dataclass(kw_only=True, slots=True, frozen=True)
class Node:
    """Which node this is: its number ``rank``, the address ``master`` (HOST:PORT) of node 0, and
    the name ``meeting`` under which the nodes find each other. A single node needs no master."""

    rank: int = 0
    master: str | None = None
    meeting: str = ""


def torchrun_command(
    config: RunConfig, *, run_dir: Path, node: Node, program: Sequence[str] | None = None
) -> list[str]:
    """The torchrun command of one node, whose ranks execute ``program`` (default: the worker).

    Raises:
        LaunchError: the node's number or the address of node 0 are missing or impossible.
    """
    launch = config.launch
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={launch.nodes}",
        f"--nproc-per-node={launch.nproc}",
        *_rendezvous(config, run_dir=run_dir, node=node),
        f"--max-restarts={launch.max_restarts}",
        f"--shutdown-timeout={SAVE_SECONDS}",
        *(program or ("-m", RANK, str(run_dir))),
    ]


def _rendezvous(config: RunConfig, *, run_dir: Path, node: Node) -> list[str]:
    launch = config.launch
    if not 0 <= node.rank < launch.nodes:
        raise LaunchError(
            f"--node-rank {node.rank} is outside 0..{launch.nodes - 1} (launch.nodes)"
        )
    if node.master is None and launch.nodes > 1:
        raise LaunchError(
            f"launch.nodes={launch.nodes} needs to know node 0; add --master HOST:PORT, and "
            "--node-rank R on every node"
        )
    host, port = _address(node.master or "localhost")
    if launch.nodes == 1:
        # A free port of its own, so that two runs can share a host.
        return ["--standalone", "--local-addr=127.0.0.1"]
    meeting = launch.rendezvous_id or node.meeting or f"emu35-{crc32(str(run_dir).encode()):08x}"
    if launch.rendezvous is RendezvousKind.static:
        return [
            f"--node-rank={node.rank}",
            f"--master-addr={host}",
            f"--master-port={port}",
            f"--rdzv-id={meeting}",
            f"--rdzv-conf=timeout={launch.timeout}",
        ]
    is_host = str(node.rank == 0).lower()
    return [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={host}:{port}",
        f"--rdzv-id={meeting}",
        f"--rdzv-conf=is_host={is_host},join_timeout={launch.timeout},read_timeout={launch.timeout}",
    ]


def _address(master: str) -> tuple[str, int]:
    match = _MASTER.fullmatch(master)
    port = int(match["port"] or 29500) if match else 0
    if match is None or not 0 < port < 65536:
        raise LaunchError(
            f"--master {master} is no HOST:PORT; as in --master node0:29500, or [fd00::1]:29500"
        )
    return match["host"], port


def run_node(
    config: RunConfig, *, run_dir: Path, node: Node, program: Sequence[str] | None = None
) -> int:
    """Run this node's ranks to their end; returns the exit code, 75 if all were stopped and saved.

    ``program`` is what torchrun executes on a rank: a script and its arguments, by default the
    worker on ``run_dir``.

    Raises:
        LaunchError: torchrun cannot be started, or a rank failed.
    """
    command = torchrun_command(config, run_dir=run_dir, node=node, program=program)
    try:
        (run_dir / LOGS).mkdir(exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="emu35-")
    except OSError as error:
        raise LaunchError(f"{error.filename} cannot be made: {error.strerror}") from None
    with folder, _listening() as requests:
        agent = _Agent.start(command, config=config, folder=Path(folder.name), requests=requests)
        try:
            code = agent.wait()
        finally:
            agent.kill()
        told = outcomes.reported(folder.name)
    return _answer(config, code=code, told=told, requests=requests, run_dir=run_dir)


@dataclass(kw_only=True, slots=True)
class _Requests:
    """The stop signals that this process got: the first, and whether there was another."""

    first: signal.Signals | None = None
    at: float = 0.0
    second: signal.Signals | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.at = signal.Signals(number), now
        elif now - self.at > _SAME_REQUEST_SECONDS:
            self.second = signal.Signals(number)


@contextmanager
def _listening() -> Generator[_Requests]:
    requests = _Requests()
    previous = {number: signal.signal(number, requests.note) for number in _STOP_SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(kw_only=True, slots=True)
class _Agent:
    """The torchrun process and the ``nproc`` ranks below it, which tell their outcomes in
    ``folder``. ``asked`` are ranks that have been signalled."""

    process: subprocess.Popen[bytes]
    requests: _Requests
    folder: Path
    nproc: int
    asked: set[int] = field(default_factory=set[int])
    ended: bool = False

    @classmethod
    def start(
        cls, command: Sequence[str], *, config: RunConfig, folder: Path, requests: _Requests
    ) -> "_Agent":
        environment = {
            **rank_environment(config),
            outcomes.FOLDER: str(folder),
            # torchrun lends its own key-value store to the ranks, and keeps it over restarts: ranks
            # would find the addresses of the attempt before in it, and wait for them.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            SUPERVISOR_PID: str(os.getpid()),
        }
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            process = subprocess.Popen(
                list(command),
                env=environment,
                stdin=subprocess.DEVNULL,
                # Ctrl-C reaches the whole foreground group, and torchrun would end the ranks.
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        except OSError as error:
            raise LaunchError(f"torchrun could not be started: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        return cls(process=process, requests=requests, folder=folder, nproc=config.launch.nproc)

    def wait(self) -> int:
        """Pass stop requests on until torchrun ends; returns its exit code."""
        while self.process.poll() is None:
            if self.requests.second is not None:
                self.kill()
            elif self.requests.first is not None:
                self._ask_to_stop()
            time.sleep(_POLL_SECONDS)
        return self.process.returncode

    def kill(self) -> None:
        """Make sure that neither torchrun nor a rank is left behind."""
        ranks = self._ranks()
        if self.process.poll() is None:
            self.process.kill()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()
        self.process.wait()

    def _ask_to_stop(self) -> None:
        ranks = self._ranks()
        if not ranks and not self.asked and not self.ended and not self._all_ended_well():
            self.ended = True
            self.process.terminate()
        for rank in ranks:
            # Once each: what torchrun starts again after this is asked as well.
            if rank.pid not in self.asked:
                self.asked.add(rank.pid)
                with suppress(psutil.NoSuchProcess):
                    rank.send_signal(signal.SIGUSR1)

    def _all_ended_well(self) -> bool:
        """Whether torchrun only waits for the other nodes."""
        ends = [
            outcome.code in (0, Interrupted.exit_code) for outcome in outcomes.reported(self.folder)
        ]
        return len(ends) == self.nproc and all(ends)

    def _ranks(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []


def _die_with_parent():
    """For the child, between fork and exec: nothing is left to look up there."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request above
            os._exit(1)

    return ask


def _answer(
    config: RunConfig,
    *,
    code: int,
    told: list[outcomes.Outcome],
    requests: _Requests,
    run_dir: Path,
) -> int:
    """The exit code of this node, or the reason why a rank failed."""
    interrupted = [outcome for outcome in told if outcome.code == Interrupted.exit_code]
    if len(interrupted) == config.launch.nproc or (interrupted and code == 0):
        return Interrupted.exit_code
    if code == 0 or [outcome.code for outcome in told] == [0] * config.launch.nproc:
        # Ranks that have finished are not undone by what happens to torchrun while it waits for
        # other nodes.
        return 0
    for outcome in told:
        if outcome.code == Emu35Error.exit_code:
            if outcome.rank == 0:
                return Emu35Error.exit_code  # it has told the user itself
            log = run_dir / LOGS / f"rank{outcome.rank}.log"
            raise LaunchError(f"rank {outcome.rank} stopped; {log} ends with:\n{tail(log)}")
    asked = requests.second or requests.first
    if asked is not None:
        return 128 + asked
    raise LaunchError(
        f"torchrun ended with exit code {code}; its report above names the rank that failed first, "
        f"and {run_dir / LOGS}/rankN.log is what rank N printed"
    )


def main() -> int:
    """The node of a Slurm job; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m emu35.run.torchrun", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="prepared by `emu35 launch`")
    parser.add_argument(
        "--node-rank",
        type=int,
        default=int(os.environ.get("SLURM_NODEID", "0")),
        help="default: what Slurm says",
    )
    parser.add_argument("--master", metavar="HOST:PORT", help="address of node 0")
    parser.add_argument("--id", default="", help="name under which the nodes meet")
    words = parser.parse_args()
    try:
        node = Node(rank=words.node_rank, master=words.master, meeting=words.id)
        return run_node(read_config(words.run_dir), run_dir=words.run_dir, node=node)
    except Emu35Error as error:
        print(f"emu35: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
