"""The one thread that uses the engine.

Whoever wants something puts a command of :mod:`.calls` into the mailbox. Between two steps the
thread takes what lies there, applies it in order, and after the step it hands every call its
updates, one wake-up of the event loop a step. While nothing is asked it sleeps. Where ranks share
the model this is rank 0's thread, and the engine tells the others (:mod:`emu35.inference.lead`).

A step that fails (diverged weights, memory) fails the requests in flight, and only these: they are
taken out of the engine, the health is bad until a step succeeds again, and the thread goes on. If
the engine cannot even let go of them, as where ranks have lost each other, it is not used any more:
whatever is asked gets an error, the health says to restart, and the thread waits to be stopped.
"""

import asyncio
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from emu35.errors import Emu35Error, LaunchError
from emu35.inference.engine import Engine, EngineStats
from emu35.inference.grammar import NextKind
from emu35.inference.request import Finish, Generated, Request, Update
from emu35.stages.serve.calls import Abort, Call, Command, EngineFailure, Item, Stop, Submit, Work
from emu35.stages.serve.keyed import KeyedEngine
from emu35.stages.serve.metrics import Metrics

T = TypeVar("T")


@dataclass(kw_only=True, slots=True)
class _Flight:
    """A request in the engine."""

    call: Call
    place: int
    accepted: float
    admitted: float | None = None
    first_token: float | None = None
    tokens: int = 0


@dataclass(kw_only=True, slots=True)
class _Pace:
    """How long requests have lately taken, in seconds: what Retry-After is guessed from."""

    mean: float = 1.0

    def note(self, seconds: float) -> None:
        self.mean += 0.2 * (seconds - self.mean)


class EngineThread:
    """Made and used from the event loop; ``make`` builds the engine inside the thread.

    ``failure`` is what health shows: the last step's, None while all is well.
    """

    def __init__(self, make: Callable[[], Engine], *, metrics: Metrics) -> None:
        self._make = make
        self._metrics = metrics
        self._mailbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop = asyncio.get_running_loop()
        self._made: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._calls: dict[int, Call] = {}  # by the first key; until the engine has them
        self._keys = 0
        self._flights: dict[int, _Flight] = {}  # by key, oldest first
        self._pace = _Pace()
        self._stopping = False
        self.stats: EngineStats | None = None
        self.failure: str | None = None

    async def start(self) -> None:
        """Build the engine; returns when it is ready.

        Raises:
            Whatever building it raises.
        """
        self._thread.start()
        await self._made

    async def stop(self) -> None:
        """Abort what runs (its calls get their last update) and end the thread."""
        self._mailbox.put(Stop())
        await self._ended

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._flights)

    @property
    def retry_after(self) -> int:
        """Seconds after which a place is likely to be free."""
        stats = self.stats
        rounds = 1.0 if stats is None else (stats.waiting + 1) / max(stats.active, 1)
        return max(1, min(120, round(self._pace.mean * rounds)))

    async def submit(self, requests: Sequence[Request]) -> Call:
        """Hand over ``requests``, all of them or none.

        Raises:
            ConfigError: one of them can never run.
            QueueFull: the waiting line is full.
            EngineFailure: the engine is not usable any more.
        """
        keys = tuple(range(self._keys, self._keys + len(requests)))
        self._keys += len(requests)
        call = Call(keys, abort=self._post_abort)
        self._calls[keys[0]] = call
        self._mailbox.put(Submit(requests=tuple(requests), keys=keys))
        try:
            await call.accepted
        except asyncio.CancelledError:
            call.close()
            raise
        return call

    def abort_all(self) -> None:
        """Abort everything in flight; the calls get their last update."""
        self._mailbox.put(Abort(keys=None))

    async def work(self, function: Callable[[Engine], T]) -> T:
        """What ``function`` gives, called with the engine in its thread, behind all that was asked
        before.

        Raises:
            EngineFailure: the engine is not usable any more.
            Whatever ``function`` raises.
        """
        done: asyncio.Future[T] = self._loop.create_future()
        self._mailbox.put(Work(function=function, done=done))
        return await done

    def _post_abort(self, keys: tuple[int, ...]) -> None:
        self._mailbox.put(Abort(keys=keys))

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            engine = KeyedEngine(self._make())
        except BaseException as error:  # whoever awaits start() gets it
            self._post(_fail, self._made, error)
            self._post(_succeed, self._ended)
            return
        self.stats = engine.stats
        self._post(_succeed, self._made)
        try:
            while self._apply(self._commands(wait=not engine.busy), engine=engine):
                if engine.busy:
                    self._step(engine)
                self.stats = engine.stats
        except BaseException as error:
            self._die(error)
            while not self._stopping:
                for command in self._commands(wait=True):
                    if isinstance(command, Submit):
                        self._refuse(command, EngineFailure(self.failure))
                    elif isinstance(command, Work):
                        self._post(_fail, command.done, EngineFailure(self.failure))
        try:
            engine.close()
        except Exception as error:  # the other ranks may be gone
            report("the engine could not be closed", error)
        self._post(_succeed, self._ended)

    def _commands(self, *, wait: bool) -> list[Command]:
        """What lies in the mailbox; with ``wait`` at least one."""
        commands = [self._mailbox.get()] if wait else []
        while not self._mailbox.empty():
            commands.append(self._mailbox.get())
        # Kept in mind, as a command before it may fail.
        self._stopping = self._stopping or any(isinstance(each, Stop) for each in commands)
        return commands

    def _apply(self, commands: Sequence[Command], *, engine: KeyedEngine) -> bool:
        """Do as told; False to leave."""
        for command in commands:
            if isinstance(command, Submit):
                self._submit(command, engine=engine)
            elif isinstance(command, Abort):
                self._deliver(engine.abort(command.keys))
            elif isinstance(command, Work):
                self._work(command, engine=engine)
            else:
                self._deliver(engine.abort(None))
                return False
        return True

    def _submit(self, command: Submit, *, engine: KeyedEngine) -> None:
        try:
            engine.submit(command)
        except LaunchError:  # the ranks have lost each other, which ends the use of this engine
            raise
        except Emu35Error as error:
            self._refuse(command, error)
            return
        except Exception as error:
            report("the engine failed to take a request", error)
            self._refuse(command, EngineFailure(describe(error)))
            return
        call, now = self._calls.pop(command.keys[0]), time.perf_counter()
        for place, key in enumerate(command.keys):
            self._flights[key] = _Flight(call=call, place=place, accepted=now)
            self._metrics.tokens.labels("prompt").inc(len(command.requests[place].prompt))
        self._post(_succeed, call.accepted)

    def _work(self, command: Work, *, engine: KeyedEngine) -> None:
        try:
            found = engine.work(command.function)
        except LaunchError as error:
            self._post(_fail, command.done, EngineFailure(describe(error)))
            raise
        except Exception as error:
            self._post(_fail, command.done, error)
            return
        self._post(_succeed, command.done, found)

    def _refuse(self, command: Submit, error: Exception) -> None:
        if (call := self._calls.pop(command.keys[0], None)) is not None:
            self._post(_fail, call.accepted, error)

    def _step(self, engine: KeyedEngine) -> None:
        try:
            updates = engine.step()
        except Exception as error:
            self.failure = describe(error)
            self._metrics.failures.inc()
            report("a step of the engine failed; its requests got an error", error)
            engine.abort(None)  # raising here ends the use of this engine
            self._fail_flights(list(self._flights), reason=self.failure)
            return
        self.failure = None
        self._note_admitted(engine.stats.waiting)
        self._deliver(updates)

    def _fail_flights(self, keys: Sequence[int], *, reason: str) -> None:
        calls = {id(flight.call): flight.call for flight in map(self._flights.pop, keys)}
        for call in calls.values():
            self._post(call.put, EngineFailure(reason))
        self._metrics.ended.labels("error").inc(len(keys))

    def _die(self, error: BaseException) -> None:
        self.failure = f"{describe(error)}; the engine cannot go on: restart the server"
        report("the engine thread failed and serves nothing more", error)
        self._fail_flights(list(self._flights), reason=self.failure)
        for call in list(self._calls.values()):
            self._post(_fail, call.accepted, EngineFailure(self.failure))
        self._calls.clear()

    def _deliver(self, updates: Sequence[tuple[int, Update | Exception]]) -> None:
        items: list[tuple[Call, Item]] = []
        now = time.perf_counter()
        for key, update in updates:
            if isinstance(update, Exception):
                report("an aborted request has no answer", update)
                self._fail_flights([key], reason=describe(update))
                continue
            flight = self._flights[key]
            self._measure(flight, update, now=now)
            items.append((flight.call, (flight.place, update)))
            if update.finished is not None:
                del self._flights[key]
        if items:
            self._post(_put, items)

    def _note_admitted(self, waiting: int) -> None:
        """Requests leave the waiting line in order, so its length tells which ones have."""
        outside = [f for f in self._flights.values() if f.admitted is None]
        now = time.perf_counter()
        for flight in outside[: max(0, len(outside) - waiting)]:
            flight.admitted = now
            self._metrics.queue_time.observe(now - flight.accepted)

    def _measure(self, flight: _Flight, update: Update, *, now: float) -> None:
        metrics = self._metrics
        if flight.first_token is None and update.tokens:
            flight.first_token = now
            metrics.first_token_time.observe(now - flight.accepted)
        flight.tokens += len(update.tokens)
        for token in update.tokens:
            metrics.tokens.labels(_KINDS[token.kind]).inc()
        if update.finished is None:
            return
        self._measure_whole(flight, update.finished, now=now)

    def _measure_whole(self, flight: _Flight, finished: Generated, *, now: float) -> None:
        metrics = self._metrics
        metrics.ended.labels(finished.finish.value).inc()
        metrics.images.inc(len(finished.document.images))
        if flight.first_token is not None and flight.tokens > 1:
            metrics.token_time.observe((now - flight.first_token) / (flight.tokens - 1))
        if finished.finish is not Finish.abort:
            self._pace.note(now - flight.accepted)

    def _post(self, function: Callable[..., object], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)


_KINDS = {
    NextKind.FORCED: "forced",
    NextKind.AMONG: "size",
    NextKind.TEXT: "text",
    NextKind.VISUAL: "visual",
}


def _put(items: Sequence[tuple[Call, Item]]) -> None:
    for call, item in items:
        call.put(item)


def _succeed(future: "asyncio.Future[Any]", result: object = None) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[Any]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def describe(error: BaseException) -> str:
    """``error`` as a client may read it: no traceback."""
    return str(error) if isinstance(error, Emu35Error) else f"{type(error).__name__}: {error}"


def report(what: str, error: BaseException) -> None:
    """Say on the console ``what`` has failed, with the traceback of what is a bug."""
    trace = "" if isinstance(error, Emu35Error) else "".join(traceback.format_exception(error))
    sys.stderr.write(f"emu35: {what}: {error}\n{trace}")
    sys.stderr.flush()
