"""Local ranks: processes of this host, started and answered for without torchrun.

Signals are passed on to them, the first one to fail takes the others with it and is named with the
end of its log, and the exit code is theirs (75 when they were stopped and saved). Nothing but this
process stands between a signal and the ranks, and a rank's exit code arrives as it is; what it
takes to have the same through torchrun is in :mod:`emu35.run.torchrun`.

Ranks may also be led by rank 0 (:mod:`emu35.run.tp`): it has the terminal, and its end is the end
of all.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import BinaryIO

from emu35.config.root import RunConfig
from emu35.errors import Emu35Error, Interrupted, LaunchError
from emu35.run.rundir import LOGS
from emu35.run.worker import LAUNCHER_PID, rank_environment

WORKER = "emu35.run.worker"

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0
_TAIL_LINES = 20


def run_ranks(
    config: RunConfig,
    *,
    run_dir: Path,
    lock: int | None = None,
    command: Sequence[str] | None = None,
    led: bool = False,
) -> int:
    """Run ``launch.nproc`` ranks here until all have ended; returns the exit code.

    ``lock`` is the descriptor of the run folder's lock, which every rank inherits. Rank 0 writes
    to our standard output and error; ``logs/rankN.log`` receives what the others print. ``command``
    is what a rank executes, by default the worker on ``run_dir``. Ranks that are ``led`` end with
    rank 0, which also reads our standard input.

    Raises:
        LaunchError: a rank failed; the message names it and shows the end of its log.
    """
    ranks = _Ranks(logs=run_dir / LOGS, led=led)
    command = command or [sys.executable, "-m", WORKER, str(run_dir)]
    ranks.logs.mkdir(exist_ok=True)
    with _forwarding(ranks):
        try:
            port = _free_port()
            for rank in range(config.launch.nproc):
                ranks.start(
                    rank,
                    command=command,
                    environment=_environment(config, rank=rank, port=port),
                    lock=lock,
                )
            return ranks.wait()
        finally:
            ranks.kill()


@dataclass(kw_only=True, slots=True)
class _Ranks:
    """The processes of a local run."""

    logs: Path
    led: bool = False
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])
    echo: Thread | None = None
    signalled: signal.Signals | None = None

    def log(self, rank: int) -> Path:
        return self.logs / f"rank{rank}.log"

    def start(
        self, rank: int, *, command: Sequence[str], environment: Mapping[str, str], lock: int | None
    ) -> None:
        # A leader has the terminal itself: what it draws there depends on its being one.
        leads = self.led and rank == 0
        log = self.log(rank).open("ab")
        with log:
            try:
                process = subprocess.Popen(
                    list(command),
                    env=dict(environment),
                    stdin=None if leads else subprocess.DEVNULL,
                    stdout=None if rank == 0 else log,
                    stderr=None if leads else subprocess.PIPE if rank == 0 else log,
                    pass_fds=() if lock is None else (lock,),
                    # Ctrl-C reaches the whole foreground group: without a session of its own a
                    # rank would see it twice, once from the terminal and once from us.
                    start_new_session=True,
                )
            except OSError as error:
                raise LaunchError(f"rank {rank} could not be started: {error}") from error
        self.processes.append(process)
        if process.stderr is not None:
            self.echo = Thread(
                target=_echo, kwargs={"source": process.stderr, "log": self.log(rank)}, daemon=True
            )
            self.echo.start()
        if self.signalled is not None:  # asked to stop while starting
            self.send(self.signalled)

    def send(self, number: signal.Signals) -> None:
        """Pass a signal on to every rank that still runs."""
        self.signalled = number
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Wait for all ranks; a failed one ends the others."""
        while True:
            codes = [process.poll() for process in self.processes]
            failed = [r for r, code in enumerate(codes) if code not in (None, 0, 75)]
            if failed:
                if self.led and 0 in failed:
                    self.kill()  # nothing is left to do for the others
                else:
                    self._let_others_end()
                self._finish_echo()
                # A rank that was killed comes first: the others fail because their peer is gone.
                failed.sort(key=lambda r: (codes[r] or 0) >= 0)
                return self._answer_for_led(failed) if self.led else self._answer_for(failed[0])
            if self.led and codes[0] is not None:
                self._let_others_end()
                return codes[0]
            if None not in codes:
                self._finish_echo()
                return Interrupted.exit_code if Interrupted.exit_code in codes else 0
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """Make sure that no rank is left behind."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait()

    def _let_others_end(self) -> None:
        """Ranks that fail alike end within moments; one waiting for the failed rank never does."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline and any(p.poll() is None for p in self.processes):
            time.sleep(_POLL_SECONDS)
        self.kill()

    def _finish_echo(self) -> None:
        if self.echo is not None:
            # A grandchild may hold the pipe open for ever; what rank 0 wrote is through by then.
            self.echo.join(timeout=2.0)

    def _answer_for(self, rank: int) -> int:
        code = self.processes[rank].returncode
        if self.signalled is not None and code in (-self.signalled, 128 + self.signalled):
            return 128 + self.signalled
        if self.processes[0].returncode == Emu35Error.exit_code:
            return Emu35Error.exit_code  # rank 0 has already told the user
        raise self._failure(rank)

    def _answer_for_led(self, failed: list[int]) -> int:
        """Rank 0's own code, unless it can only have crashed for want of another rank."""
        code = self.processes[0].returncode
        others = [rank for rank in failed if rank != 0]
        crashed = (code == 1 or code < 0) and code != -(self.signalled or 0)
        if others and crashed:
            raise self._failure(others[0])
        return code if code >= 0 else 128 - code

    def _failure(self, rank: int) -> LaunchError:
        code, log = self.processes[rank].returncode, self.log(rank)
        how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        return LaunchError(f"rank {rank} {how}; {log} ends with:\n{tail(log)}")


def _environment(config: RunConfig, *, rank: int, port: int) -> dict[str, str]:
    """The variables of torchrun, plus ours."""
    size = str(config.launch.nproc)
    return {
        **rank_environment(config),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHER_PID: str(os.getpid()),
    }


@contextmanager
def _forwarding(ranks: _Ranks) -> Generator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        ranks.send(signal.Signals(number))

    previous = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _echo(*, source: BinaryIO, log: Path) -> None:
    """Copy what rank 0 writes to its standard error to ours and to its log."""
    with source, log.open("ab") as copy:
        while chunk := os.read(source.fileno(), 65536):
            copy.write(chunk)
            copy.flush()
            with suppress(OSError, ValueError):
                sys.stderr.buffer.write(chunk)
                sys.stderr.buffer.flush()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tail(log: Path) -> str:
    """The last lines of a rank's log, indented."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    return "\n".join(f"    {line}" for line in lines) or "    (nothing)"


def signal_name(number: int) -> str:
    """SIGKILL rather than 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
