"""The engine under the numbers of calls: what every tensor-parallel rank does alike.

Rank 0 decides (:mod:`.engine_thread`), and before each step it tells the others what has come in;
:func:`follow` is all they do. They read no request and answer nobody.
"""

from collections.abc import Callable, Sequence

import torch.distributed as dist

from emu35.inference.engine import Engine, EngineStats
from emu35.inference.request import Update
from emu35.parallel.mesh import current_mesh
from emu35.stages.serve.calls import Abort, Command, Stop, Submit


class Replica:
    """An engine whose requests are known by the keys of :class:`~.calls.Submit`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._index_of: dict[int, int] = {}
        self._key_of: dict[int, int] = {}

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self._engine.busy

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


def share(commands: Sequence[Command]) -> Sequence[Command]:
    """What rank 0 of the tensor-parallel group was told to do, on all its ranks. Collective."""
    mesh = current_mesh()
    if mesh.tp_size == 1:
        return commands
    box = [commands]
    dist.broadcast_object_list(box, src=dist.get_global_rank(mesh.tp_group, 0), group=mesh.tp_group)
    return box[0]


def follow(make: Callable[[], Engine]) -> None:
    """Do as rank 0 does, until it says stop."""
    replica = Replica(make())
    while True:
        for command in share(()):
            if isinstance(command, Stop):
                return
            _obey(command, replica=replica)
        if not replica.busy:
            continue
        try:
            replica.step()
        except Exception:
            # It failed on rank 0 as well, where it is reported and the same is done about it.
            replica.abort(None)


def _obey(command: Submit | Abort, *, replica: Replica) -> None:
    if isinstance(command, Abort):
        replica.abort(command.keys)
        return
    try:
        replica.submit(command)
    except Exception:
        return  # refused on rank 0 as well, which has somebody to tell
