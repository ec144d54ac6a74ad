"""What goes between the event loop and the engine's thread."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from emu35.inference.engine import Engine
from emu35.inference.request import Request, Update


class EngineFailure(Exception):
    """The engine failed while it worked on a call; ``str()`` says how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submit:
    """Generate ``requests``, all or none, under the numbers ``keys``."""

    requests: tuple[Request, ...]
    keys: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Abort:
    """End the requests ``keys`` (None: all) at once, where they have not ended."""

    keys: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Do ``function`` with the engine between two steps; ``done`` gets what it gives."""

    function: Callable[[Engine], Any]
    done: "asyncio.Future[Any]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """Leave."""


Command: TypeAlias = Submit | Abort | Work | Stop
Item: TypeAlias = tuple[int, Update] | EngineFailure


class Call:
    """The requests of one HTTP call, in flight. Iterate for (place of the request, update)."""

    def __init__(self, keys: tuple[int, ...], *, abort: Callable[[tuple[int, ...]], None]) -> None:
        self.keys = keys
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._items: asyncio.Queue[Item] = asyncio.Queue()
        self._running = set(range(len(keys)))
        self._abort = abort

    def put(self, item: Item) -> None:
        """Hand over what the engine did; in the event loop."""
        self._items.put_nowait(item)

    async def next(self, *, patience: float | None = None) -> list[tuple[int, Update]]:
        """Everything that has come, at least one item; empty when ``patience`` (seconds) ran out.

        Raises:
            EngineFailure: the engine failed; nothing more comes.
        """
        try:
            items = [await asyncio.wait_for(self._items.get(), patience)]
        except TimeoutError:
            return []
        while not self._items.empty():
            items.append(self._items.get_nowait())
        updates: list[tuple[int, Update]] = []
        for item in items:
            if isinstance(item, EngineFailure):
                self.close()
                raise item
            updates.append(item)
            if item[1].finished is not None:
                self._running.discard(item[0])
        return updates

    @property
    def running(self) -> bool:
        """Whether anything more will come."""
        return bool(self._running)

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Every update until all requests have ended.

        Raises:
            EngineFailure: as :meth:`next`.
        """
        while self.running:
            for item in await self.next():
                yield item

    def close(self) -> None:
        """Abort what still runs: nobody reads it any more."""
        if self._running:
            self._abort(tuple(self.keys[place] for place in self._running))
            self._running.clear()
