"""Rollout servers: who is asked, what can go wrong with an answer, and what is done about it.

A request goes to the server that has the fewest; when that one is slow, gone, or answers something
that is no answer, another one is asked. A server that fails several times running is asked no more
until it has been given new weights. When nobody is left, or a request has failed too often, that is
the result of the request: there is never a made-up one. Everything that went wrong is counted.
"""

import asyncio
import json
import queue
import random
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import httpx

from emu35.errors import ConfigError, Emu35Error, LaunchError
from emu35.inference.request import Generated, Request
from emu35.stages.grpo.remote_body import BadAnswer, Reader, body_of

_ATTEMPTS = 5
"""How often a request is tried."""

_STRIKES = 3
"""Failures running after which a server is given up."""

_CONNECT_SECONDS = 10.0
_BACKOFF = 0.2
"""Seconds before a second attempt; doubled with each, and up to as much again at random."""

_LARGEST_ANSWER = 2**30
"""Bytes; a picture of 4,096 codes with 5,120 candidates each has 112 MiB."""


class Dialect(StrEnum):
    """Whose server it is: they differ in how weights are replaced, and in what an answer says."""

    emu35 = "emu35"
    vllm = "vllm"


@dataclass(kw_only=True, slots=True)
class RemoteCounts:
    """What happened since the engine was made: ``answered`` requests, and attempts that failed.
    ``busy`` counts refusals for want of room (429), which are waited out, ``errors`` failures of
    the server (5xx), ``garbage`` answers that are none, ``stale`` ones by other
    weights than the trainer's, ``given_up`` servers."""

    answered: int = 0
    timeouts: int = 0
    disconnects: int = 0
    busy: int = 0
    errors: int = 0
    garbage: int = 0
    stale: int = 0
    given_up: int = 0

    def metrics(self) -> dict[str, float]:
        """By name."""
        return {f"engine/{name}": float(value) for name, value in asdict(self).items()}


@dataclass(kw_only=True, slots=True, eq=False)
class Server:
    """A server at ``url`` that serves ``model``. ``weights`` is the tag of what it was given; None
    where that cannot be known from its answers."""

    url: str
    model: str
    dialect: Dialect
    weights: str | None = None
    in_flight: int = 0
    strikes: int = 0
    trouble: str | None = None

    @property
    def usable(self) -> bool:
        """Whether it may be asked."""
        return self.trouble is None


class _Trouble(Exception):
    """An attempt failed in a way that another server, or a later attempt, may not; ``count`` is the
    field of :class:`RemoteCounts`."""

    def __init__(self, what: str, *, count: str, strike: bool = True) -> None:
        super().__init__(what)
        self.count = count
        self.strike = strike


class _Busy(Exception):
    """The server has no room for ``seconds``."""

    def __init__(self, what: str, *, seconds: float) -> None:
        super().__init__(what)
        self.seconds = seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """What became of request ``index``: exactly one of the two."""

    index: int
    answer: Generated | None = None
    error: Emu35Error | None = None


@dataclass(kw_only=True, slots=True)
class Asking:
    """Asks servers from a thread of its own, which keeps no process from ending.

    Args:
        reader: reads answers.
        timeout: seconds an attempt may take, the server's waiting line included.
        at_once: requests on their way at a time.
        headers: sent along, such as a key.
    """

    reader: Reader
    timeout: float
    at_once: int
    headers: dict[str, str] = field(default_factory=dict[str, str])
    counts: RemoteCounts = field(default_factory=RemoteCounts)
    servers: Sequence[Server] = ()
    _turn: int = 0
    _ended: "queue.SimpleQueue[Ended]" = field(default_factory=queue.SimpleQueue)
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)
    _room: asyncio.Semaphore | None = None
    _client: httpx.AsyncClient | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None

    def use(self, servers: Sequence[Server]) -> None:
        """From now on ask ``servers``; nothing may be on its way."""
        self.servers = list(servers)
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=self._run, args=(self._loop,), name="rollouts", daemon=True
            )
            self._thread.start()

    def submit(self, index: int, request: Request) -> None:
        """Ask for ``request``."""
        assert self._loop is not None, "nobody is there to be asked"
        self._loop.call_soon_threadsafe(self._begin, index, request)

    def ended(self, *, wait: float) -> list[Ended]:
        """What has ended, waiting up to ``wait`` seconds for the first."""
        found: list[Ended] = []
        try:
            found.append(self._ended.get(timeout=wait))
            while True:
                found.append(self._ended.get_nowait())
        except queue.Empty:
            return found

    def cancel(self) -> None:
        """Forget whatever is on its way."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result(10)
        self.ended(wait=0)

    def close(self) -> None:
        """End the thread."""
        if self._loop is not None and self._thread is not None:
            self.cancel()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop = self._thread = None

    # What follows runs in the thread.

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        self._room = asyncio.Semaphore(self.at_once)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.at_once)
        timeout = httpx.Timeout(self.timeout, connect=min(_CONNECT_SECONDS, self.timeout))
        self._client = httpx.AsyncClient(limits=limits, timeout=timeout, headers=self.headers)
        loop.run_forever()
        loop.run_until_complete(self._client.aclose())
        loop.close()

    async def _cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, index: int, request: Request) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(index, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, index: int, request: Request) -> None:
        assert self._room is not None
        try:
            async with self._room:
                answer = await self._ask(index, request)
            self.counts.answered += 1
            self._ended.put(Ended(index=index, answer=answer))
        except Emu35Error as error:
            self._ended.put(Ended(index=index, error=error))
        except Exception as error:  # a bug, which must not leave anybody waiting
            text = f"request {index} failed in the trainer: {type(error).__name__}: {error}"
            self._ended.put(Ended(index=index, error=LaunchError(text)))

    async def _ask(self, index: int, request: Request) -> Generated:
        """The answer, from whoever gives it.

        Raises:
            ConfigError: a server says that it can never answer this.
            LaunchError: nobody gives one.
        """
        problems: list[str] = []
        tried: Server | None = None
        for attempt in range(_ATTEMPTS):
            server = tried = self._choose(after=tried, problems=problems)
            server.in_flight += 1
            try:
                answer = await self._patiently(server, request, index=index)
            except _Trouble as error:
                problems.append(f"{server.url}: {error}")
                self._note(server, error)
            else:
                server.strikes = 0
                return answer
            finally:
                server.in_flight -= 1
            await asyncio.sleep(_BACKOFF * 2**attempt * (1 + random.random()))
        raise LaunchError(
            f"{_ATTEMPTS} attempts at one rollout failed: {'; '.join(problems)}. See to the "
            "servers and run the same command again"
        )

    def _choose(self, *, after: Server | None, problems: Sequence[str]) -> Server:
        """The usable server with the fewest requests; of several the next in turn, and one other
        than ``after`` if there is any."""
        usable = [server for server in self.servers if server.usable]
        if not usable:
            known = [f"{each.url}: {each.trouble}" for each in self.servers]
            raise LaunchError(
                f"no rollout server is left: {'; '.join([*known, *problems[-1:]])}. See to them "
                "and run the same command again"
            )
        self._turn += 1
        turned = usable[self._turn % len(usable) :] + usable[: self._turn % len(usable)]
        return min(turned, key=lambda each: (each is after, each.in_flight))

    def _note(self, server: Server, error: _Trouble) -> None:
        setattr(self.counts, error.count, getattr(self.counts, error.count) + 1)
        server.strikes += error.strike
        stale = error.count == "stale"
        if server.usable and (stale or server.strikes >= _STRIKES):
            server.trouble = str(error)
            self.counts.given_up += 1

    async def _patiently(self, server: Server, request: Request, *, index: int) -> Generated:
        """One attempt; a server without room is asked again until the attempt's time is up."""
        last = "no answer"
        try:
            async with asyncio.timeout(self.timeout):
                while True:
                    try:
                        return await self._attempt(server, request, index=index)
                    except _Busy as error:
                        self.counts.busy += 1
                        last = str(error)
                        await asyncio.sleep(error.seconds)
        except TimeoutError:
            what = f"{last} within {self.timeout:g} s (stage.rollout.timeout)"
            raise _Trouble(what, count="timeouts") from None

    async def _attempt(self, server: Server, request: Request, *, index: int) -> Generated:
        body = await self._post(server, body_of(request, model=server.model))
        if server.weights is not None and body.get("weights") != server.weights:
            raise _Trouble(
                f"its weights are {body.get('weights')!r}, not {server.weights!r}: it was started "
                "again, or somebody else replaces them",
                count="stale",
            )
        try:
            return self.reader.answer(body, request=request, index=index)
        except BadAnswer as error:
            raise _Trouble(f"no answer: {error}", count="garbage") from error

    async def _post(self, server: Server, body: dict[str, Any]) -> dict[str, Any]:
        assert self._client is not None
        content = bytearray()
        try:
            url = f"{server.url}/v1/completions"
            async with self._client.stream("POST", url, json=body) as response:
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > _LARGEST_ANSWER:
                        raise _Trouble(f"{len(content)} bytes and no end", count="garbage")
        except httpx.TimeoutException as error:
            raise _Trouble(f"no answer ({type(error).__name__})", count="timeouts") from error
        except httpx.HTTPError as error:
            what = f"{type(error).__name__}: {error}"
            raise _Trouble(what, count="disconnects") from error
        if response.status_code != 200:
            raise _refused(response, bytes(content[:500]))
        try:
            found = json.loads(content)
        except ValueError as error:
            raise _Trouble(f"no JSON: {error}", count="garbage") from error
        if not isinstance(found, dict):
            raise _Trouble("no JSON object", count="garbage")
        return found


def _refused(response: httpx.Response, content: bytes) -> Exception:
    """What an answer other than 200 means."""
    status, text = response.status_code, content.decode(errors="replace")
    what = f"HTTP {status}: {text}"
    if status == 429:
        wait = response.headers.get("Retry-After", "1")
        return _Busy(what, seconds=float(wait) if wait.isdigit() else 1.0)
    if status >= 500:
        return _Trouble(what, count="errors")
    return ConfigError(f"{response.url} cannot answer a rollout: {what}")
