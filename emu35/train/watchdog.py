"""Ending a run in which some rank hangs, was stopped or died, and saying which one.

The other ranks then wait in a collective, which knows at best that time ran out. So every rank has
a thread that writes a sign of life, a small file ``logs/rankN.alive`` saying where its rank stands,
several times within ``launch.timeout``. When nothing has moved for that long, the thread reads the
files of all ranks, names those that fell silent or are behind, writes the stacks of its own threads
and torch's flight recorder beside them, and leaves with an exit code. The launcher (or torchrun, or
Slurm) ends the rest.

What is merely slow is left alone. A micro-batch, a validation batch, a byte read or written while
saving or loading all count as progress; and a rank whose time is up keeps waiting while another one
still moves. A rank that was itself stopped for a while and continued does not count that while.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType

import psutil
import torch.distributed as dist

from emu35.errors import Emu35Error, LaunchError
from emu35.parallel.collectives import rank, world_size
from emu35.train.clock import Phase, StepClock

LOGS = "logs"
"""Folder inside the run folder; all hosts of a run see it."""

_SILENT_BEATS, _SILENT_SECONDS = 4, 5.0
"""A sign of life that is this many intervals old, and this many seconds (half a short timeout),
comes from a rank that cannot give another."""
_BETWEEN = ("torch/distributed/c10d_logger.py", "torch/overrides.py", "emu35/parallel/cpu.py")
"""Files through which a call passes on its way to a collective."""
_LEAST_BYTES = 65536
"""Less than this read or written between two looks is no progress: signs of life are bytes too."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Sign:
    """A sign of life: where a rank stood, and for how many seconds it had not moved."""

    rank: int
    host: str
    pid: int
    step: int
    moves: int
    phase: str
    still: float


class Watchdog:
    """Context manager around the training loop; does nothing in a world of one rank, where nobody
    waits for anybody.

    Args:
        clock: shows what this rank does.
        run_dir: gets ``logs/``.
        timeout: seconds without progress after which the rank gives up.
    """

    def __init__(self, *, clock: StepClock, run_dir: Path, timeout: float) -> None:
        self._clock, self._folder, self._timeout = clock, run_dir / LOGS, timeout
        self._interval = min(10.0, timeout / 10)
        self._silence = max(_SILENT_BEATS * self._interval, min(_SILENT_SECONDS, timeout / 2))
        self._rank, self._ranks = rank(), world_size()
        self._host = socket.gethostname()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._main = threading.get_ident()
        self._excused_at = 0.0
        self._bytes = 0

    def __enter__(self) -> "Watchdog":
        if self._ranks > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._clock.beat()
            self._give_sign()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        self._done.set()
        self._thread.join()
        if isinstance(error, Exception) and not isinstance(error, Emu35Error):
            # A collective that gives up first does not tell whom it waited for.
            if lost := self._lost():
                _say(f"rank {self._rank} failed in step {self._clock.step}. {lost}")
        else:
            self._file(self._rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._done.wait(self._interval):
            now = time.monotonic()
            if now - looked > self._silence:
                self._excused_at = now  # this very process was stopped or starved
            looked = now
            self._give_sign()
            if self._still() > self._timeout and not self._someone_moves():
                self._give_up()

    def _still(self) -> float:
        """Seconds since this rank last moved."""
        if self._clock.phase in (Phase.saving, Phase.loading) and self._transferred():
            self._clock.beat()
        return time.monotonic() - max(self._clock.moved_at, self._excused_at)

    def _transferred(self) -> bool:
        """Whether this process has read or written since the last look."""
        try:
            counters = psutil.Process().io_counters()
        except (psutil.Error, OSError):  # not every container lets a process see its own
            return False
        count = counters.read_chars + counters.write_chars
        before, self._bytes = self._bytes, count
        return count - before > _LEAST_BYTES + 1024 * self._ranks

    # ------------------------------------------------------------------ signs of life

    def _file(self, number: int) -> Path:
        return self._folder / f"rank{number}.alive"

    def _give_sign(self) -> None:
        sign = Sign(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            step=self._clock.step,
            moves=self._clock.moves,
            phase=self._clock.phase.value,
            still=round(self._still(), 1),
        )
        file = self._file(self._rank)
        temporary = file.with_suffix(".alive.tmp")
        # A full disk must not end a run that trains; the file grows old, as it should.
        with suppress(OSError):
            temporary.write_text(json.dumps(asdict(sign)), encoding="utf-8")
            temporary.replace(file)

    def _signs(self) -> Iterator[tuple[int, Sign | None, float]]:
        """(rank, its sign, how many seconds older than ours). Ages come from the file system's
        clock alone, since those of hosts differ."""
        with suppress(OSError):
            now = self._file(self._rank).stat().st_mtime
            for number in range(self._ranks):
                file = self._file(number)
                try:
                    age = now - file.stat().st_mtime
                    yield number, Sign(**json.loads(file.read_text(encoding="utf-8"))), age
                except (OSError, ValueError, TypeError):
                    yield number, None, 0.0

    def _is_silent(self, age: float) -> bool:
        return age > self._silence

    def _someone_moves(self) -> bool:
        """Whether all others are alive and one of them is making progress."""
        signs = [(sign, age) for number, sign, age in self._signs() if number != self._rank]
        if any(sign is None or self._is_silent(age) for sign, age in signs):
            return False
        return any(sign.still < self._timeout for sign, _ in signs if sign is not None)

    def _lost(self) -> str:
        """A sentence that names the ranks which can do nothing any more; empty if all can."""
        lost: list[str] = []
        for number, sign, age in self._signs():
            if sign is None:
                lost.append(f"rank {number}, which left no sign of life")
            elif self._is_silent(age) or self._is_dead_here(sign):
                lost.append(f"{_name(sign)}, last seen {age:.0f} s ago in {_where(sign)}")
        return f"Stopped or dead: {'; '.join(lost)}." if lost else ""

    def _behind(self) -> str:
        """A sentence about ranks that are alive."""
        signs = [sign for _, sign, _ in self._signs() if sign]
        furthest = max(((sign.step, sign.moves) for sign in signs), default=(0, 0))
        behind = [
            f"{_name(sign)}, in {_where(sign)}, for {sign.still:.0f} s"
            for sign in signs
            if (sign.step, sign.moves) < furthest
        ]
        if behind:
            return f"Alive, but behind the others: {'; '.join(behind)}."
        return "All ranks are alive and stand at the same point."

    def _is_dead_here(self, sign: Sign) -> bool:
        """Whether a rank of this host has ended or is stopped, which its sign cannot tell yet."""
        if sign.host != self._host:
            return False
        try:
            status = psutil.Process(sign.pid).status()
        except psutil.NoSuchProcess:
            return True
        return status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, psutil.STATUS_STOPPED)

    # ------------------------------------------------------------------ the end

    def _place(self) -> str:
        """Where the main thread is: step, phase, and the collective if it is in one."""
        text = f"in step {self._clock.step}, {self._clock.phase.value}"
        frame = sys._current_frames().get(self._main)
        found = collective_of(list(_outwards(frame)))
        return f"{text}, {found}" if found else text

    def _give_up(self) -> None:
        dump = self._folder / f"rank{self._rank}.hang.txt"
        record = self._folder / f"rank{self._rank}.flight.pickle"
        report = (
            f"rank {self._rank} made no progress for {self._still():.0f} s (launch.timeout="
            f"{self._timeout:g}) {self._place()}. {self._lost() or self._behind()} "
            f"Stacks are in {dump}, torch's flight recorder in {record}. "
            "The same command resumes from the newest checkpoint"
        )
        if self._done.is_set():  # the loop ended in the very last moment
            return
        _say(report)
        try:  # nothing here may keep this rank from leaving
            with dump.open("w", encoding="utf-8") as file:
                print(report, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            record.write_bytes(flight_record())
        except Exception as error:
            _say(f"rank {self._rank} could not leave all of them: {error}")
        finally:
            os._exit(LaunchError.exit_code)


def collective_of(frames: Sequence[FrameType]) -> str:
    """ "in all_reduce, called by any_rank (emu35/parallel/collectives.py:51)", from the innermost
    frame outwards; empty outside torch.distributed."""
    inside = ""
    for frame in frames:
        code = frame.f_code
        if code.co_filename.endswith("torch/distributed/distributed_c10d.py"):
            inside = code.co_name
        elif inside and not code.co_filename.endswith(_BETWEEN):
            place = "/".join(Path(code.co_filename).parts[-3:])
            return f"in {inside}, called by {code.co_name} ({place}:{frame.f_lineno})"
    return ""


def flight_record() -> bytes:
    """torch's record of the latest collectives of this rank, as ``torchfrtrace`` reads it."""
    from torch._C import _distributed_c10d as c10d

    name = "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace"
    return getattr(c10d, name)()


def _name(sign: Sign) -> str:
    return f"rank {sign.rank} on {sign.host} (pid {sign.pid})"


def _where(sign: Sign) -> str:
    return f"step {sign.step}, {sign.phase}"


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _say(text: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(f"emu35: {text}\n")
        sys.stderr.flush()
