"""The engine under the numbers of calls.

A call gets its requests' numbers when it is made, in the event loop; the engine's own come later,
in its thread.
"""

from collections.abc import Callable, Sequence
from typing import Any

from emu35.inference.engine import Engine, EngineStats
from emu35.inference.request import Update
from emu35.stages.serve.calls import Submit


class KeyedEngine:
    """An engine whose requests are known by the keys of :class:`~.calls.Submit`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._index_of: dict[int, int] = {}
        self._key_of: dict[int, int] = {}

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self._engine.busy

    def work(self, function: Callable[[Engine], Any]) -> Any:
        """What ``function`` gives of the engine itself."""
        return function(self._engine)

    def close(self) -> None:
        """Let the ranks that share the model end."""
        self._engine.close()

    @property
    def stats(self) -> EngineStats:
        """The engine's load and counters now."""
        return self._engine.stats

    def submit(self, command: Submit) -> None:
        """Take all requests of ``command``, or none.

        Raises:
            ConfigError, QueueFull: as the engine's ``submit``; and whatever else it raises.
        """
        indices: list[int] = []
        try:
            for request in command.requests:
                indices.append(self._engine.submit(request))
        except Exception:
            for index in indices:
                self._engine.abort(index)
            raise
        for key, index in zip(command.keys, indices, strict=True):
            self._index_of[key], self._key_of[index] = index, key

    def abort(self, keys: Sequence[int] | None) -> list[tuple[int, Update | Exception]]:
        """End the requests ``keys`` (None: all) that have not ended: each one's last update, or
        why it has none.

        Raises:
            Whatever the engine raises where a request could not be taken out of it.
        """
        ended: list[tuple[int, Update | Exception]] = []
        for key in list(self._index_of) if keys is None else keys:
            index = self._index_of.pop(key, None)
            if index is None:
                continue
            del self._key_of[index]
            try:
                update = self._engine.abort(index)
            except Exception as error:
                self._engine.abort(index)  # nothing, if only the answer could not be made
                ended.append((key, error))
                continue
            if update is not None:
                ended.append((key, update))
        return ended

    def step(self) -> list[tuple[int, Update]]:
        """One step of the engine: the updates by key.

        Raises:
            Whatever the engine raises; the requests are still in it.
        """
        updates = [(self._key_of[update.index], update) for update in self._engine.step()]
        for key, update in updates:
            if update.finished is not None:
                del self._index_of[key], self._key_of[update.index]
        return updates
