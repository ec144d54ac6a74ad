"""Several processes that read and encode inputs, each a whole input at a time.

A worker leaves the outcomes of its input in a spool file and says so through a pipe; shards,
duplicates and books are the main process's business alone. Workers are spawned, not forked, since
threads and CUDA do not survive a fork. They ignore Ctrl-C, which the main process answers by ending
them, and end by themselves when the main process is gone.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from emu35.data.ingest.product import Item, Outcome, Product
from emu35.data.ingest.spool import write_spool
from emu35.data.readers.discover import InputFile
from emu35.errors import Emu35Error, LaunchError

_REPORT_SECONDS = 0.2
_STOP_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Errand:
    """An input to encode, and where its outcomes go."""

    source: InputFile
    spool: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """How far a worker is: bytes of its input, items made of it, and the product's units in
    them."""

    offset: int = 0
    items: int = 0
    units: int = 0


def sum_reached(parts: Iterable[Reached]) -> Reached:
    """All of them together."""
    found = list(parts)
    return Reached(
        offset=sum(part.offset for part in found),
        items=sum(part.items for part in found),
        units=sum(part.units for part in found),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Finished:
    """The spool is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failed:
    """What stopped a worker: an error of the user's or of the file system, else a bug's trace."""

    error: Emu35Error | OSError | None
    trace: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setup:
    """What a worker starts with."""

    product: Product[Any]
    number: int
    workers: int


@dataclass(kw_only=True, slots=True)
class _Worker:
    """A process, its pipe, and what it is at."""

    process: SpawnProcess
    pipe: Connection
    errand: Errand | None = None
    reached: Reached = field(default_factory=Reached)


@dataclass(kw_only=True, slots=True)
class Crew:
    """Workers at a list of errands, begun in its order.

    Used as a context manager; at its end no process is left.
    """

    product: Product[Any]
    workers: int
    errands: list[Errand]
    _workers: list[_Worker] = field(default_factory=list[_Worker])
    _begun: int = 0
    _done: Reached = field(default_factory=Reached)

    def __enter__(self) -> "Crew":
        context = multiprocessing.get_context("spawn")
        count = min(self.workers, len(self.errands))
        for number in range(count):
            ours, theirs = context.Pipe()
            setup = _Setup(product=self.product, number=number, workers=count)
            process = context.Process(
                target=_work, args=(setup, theirs), name=f"emu35-ingest-{number}", daemon=True
            )
            _start(process)
            # Ours alone, so that the pipe ends when the worker does.
            theirs.close()
            self._workers.append(_Worker(process=process, pipe=ours))
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_STOP_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()

    @property
    def done(self) -> Reached:
        """What all workers have read and made so far."""
        reached = [worker.reached for worker in self._workers if worker.errand is not None]
        return sum_reached([self._done, *reached])

    def events(self) -> Iterator[Errand | None]:
        """Each errand as it is finished, and None now and then meanwhile.

        Raises:
            LaunchError: a worker died.
            Emu35Error, OSError: what stopped a worker.
        """
        for worker in self._workers:
            self._send(worker)
        while busy := [worker for worker in self._workers if worker.errand is not None]:
            for pipe in wait([worker.pipe for worker in busy]):
                (worker,) = (worker for worker in busy if worker.pipe is pipe)
                yield self._receive(worker)

    def _send(self, worker: _Worker) -> None:
        worker.reached = Reached()
        worker.errand = None
        if self._begun < len(self.errands):
            errand = self.errands[self._begun]
            self._begun += 1
            worker.errand = errand
            try:
                worker.pipe.send(errand)
            except OSError as error:
                raise _died(worker) from error

    def _receive(self, worker: _Worker) -> Errand | None:
        try:
            message: Reached | _Finished | _Failed = worker.pipe.recv()
        except (EOFError, OSError) as error:
            raise _died(worker) from error
        if isinstance(message, Reached):
            worker.reached = message
            return None
        errand = worker.errand
        assert errand is not None
        if isinstance(message, _Finished):
            whole = replace(worker.reached, offset=errand.source.size)
            self._done = sum_reached([self._done, whole])
            self._send(worker)
            return errand
        if message.error is not None:
            raise message.error
        raise RuntimeError(f"a worker failed at {errand.source.path}:\n{message.trace}")


def _start(process: SpawnProcess) -> None:
    """Start with Ctrl-C blocked, so that it cannot hit a worker that is still importing."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _died(worker: _Worker) -> LaunchError:
    worker.process.join(_STOP_SECONDS)
    code = worker.process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with {code}"
    at = worker.errand.source.path if worker.errand is not None else "no input"
    return LaunchError(
        f"a worker {how} while it read {at}; what was finished is kept. Run the same command again "
        "to go on; if memory ran out (signal 9), use fewer --workers or a smaller --images-per-call"
    )


def _work(setup: _Setup, pipe: Connection) -> None:
    """The life of a worker process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    try:
        product = setup.product
        product.join(worker=setup.number, workers=setup.workers)
        while True:
            errand: Errand = pipe.recv()
            write_spool(
                errand.spool,
                fingerprint=errand.source.fingerprint,
                outcomes=_reported(product, source=errand.source, pipe=pipe),
                pack=product.pack,
            )
            pipe.send(_Finished())
    except (EOFError, BrokenPipeError):
        # The main process is gone, or wants no more.
        return
    except (Emu35Error, OSError) as error:
        pipe.send(_Failed(error=error, trace=""))
    except BaseException:
        pipe.send(_Failed(error=None, trace=traceback.format_exc()))


def _end_with(sentinel: Any) -> None:
    wait([sentinel])
    os._exit(1)


def _reported(
    product: Product[Item], *, source: InputFile, pipe: Connection
) -> Iterator[Outcome[Item]]:
    """What comes of ``source``, with a report through the pipe every now and then and at the
    end."""
    last, reached = time.monotonic(), Reached()
    for outcome in product.outcomes(source):
        reached = Reached(
            offset=outcome.offset,
            items=reached.items + len(outcome.documents),
            units=reached.units + sum(map(product.units, outcome.documents)),
        )
        if time.monotonic() - last >= _REPORT_SECONDS:
            last = time.monotonic()
            pipe.send(reached)
        yield outcome
    pipe.send(reached)
