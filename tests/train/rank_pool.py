"""Ranks that stay: starting processes and importing torch costs more than training a tiny model."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

WORKER = Path(__file__).with_name("layout_worker.py")
PATIENCE_SECONDS = 120.0


class RankPool:
    """``ranks`` processes of ``layout_worker.py --pool`` in one gloo world; a context manager."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.processes: list[subprocess.Popen[str]] = []
        self.log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        self.log.close()

    def train(self, **spec: object) -> dict:
        """Train ``spec`` on all ranks; what rank 0 knows afterwards."""
        if not self.processes:
            self._start()
        line = json.dumps(spec) + "\n"
        with suppress(BrokenPipeError):
            for process in self.processes:
                assert process.stdin is not None
                process.stdin.write(line)
                process.stdin.flush()
        answer = self._answer()
        if not answer:
            ended = [process.poll() for process in self.processes]
            for process in self.processes:
                process.send_signal(signal.SIGABRT)  # the workers leave their stacks in the log
            time.sleep(1.0)
            self.close()
            self.log.seek(0)
            raise AssertionError(
                f"no answer to {spec}, exit codes {ended}:\n{self.log.read()[-6000:]}"
            )
        return json.loads(answer)

    def _answer(self) -> str:
        """Rank 0's line, or nothing once a rank has ended or time is up."""
        output = self.processes[0].stdout
        assert output is not None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if select.select([output], [], [], 0.5)[0]:
                return output.readline()
            if any(process.poll() is not None for process in self.processes):
                break
        return ""

    def close(self) -> None:
        """End the processes; the next :meth:`train` starts new ones."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    if stream is not None:
                        stream.close()
        self.processes = []

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.ranks):
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
            }
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(WORKER), "--pool"],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=self.log,
                    text=True,
                    start_new_session=True,
                )
            )
