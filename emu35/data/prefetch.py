"""A thread that computes ahead. Threads, because a worker process costs more than it gives here.

Reading packed samples is copying mapped memory, during which the interpreter lock is mostly free;
passing the tensors between processes would cost several times the reading.
"""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.1


class Prefetcher(Generic[T]):
    """Calls ``produce`` in a thread, at most ``depth`` results ahead; depth 0 calls it inline.

    An exception in ``produce`` is raised by :meth:`next`, after the results that came before it.
    The thread starts with the first :meth:`next` and ends at :meth:`close`.
    """

    def __init__(self, produce: Callable[[], T], *, depth: int, name: str) -> None:
        self._produce = produce
        self._depth = depth
        self._name = name
        self._queue: queue.Queue[T | BaseException] = queue.Queue(maxsize=max(depth, 1))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def next(self) -> T:
        """The next result. Not to be called after :meth:`close`."""
        assert not self._stop.is_set()
        if self._depth == 0:
            return self._produce()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        result = self._queue.get()
        if isinstance(result, BaseException):
            # The thread has ended; the same failure answers every later call.
            self._queue.put(result)
            raise result
        return result

    def close(self) -> None:
        """End the thread and drop what it computed ahead. May be called twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                result: T | BaseException = self._produce()
            except BaseException as error:
                result = error
            while not self._stop.is_set():
                try:
                    self._queue.put(result, timeout=_POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if isinstance(result, BaseException):
                return
