"""Models that only one thread at a time may use, and rewards that several threads call."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Lender(Generic[T]):
    """Lends what ``make`` makes, each to one thread at a time.

    Another one is made only while all are lent, so that there are as many as threads that ever
    called at once, and none before the first call.
    """

    def __init__(self, make: Callable[[], T], /) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._idle: list[T] = []

    @contextmanager
    def lend(self) -> Iterator[T]:
        """One of them, for the length of the block. What ``make`` raises passes through."""
        with self._lock:
            item = self._idle.pop() if self._idle else None
        if item is None:
            item = self._make()
        try:
            yield item
        finally:
            with self._lock:
                self._idle.append(item)
