"""Progress of long work: one live line on a terminal, plain lines now and then elsewhere."""

import sys
import time
from typing import TextIO

from emu35.log.console import Console, human_count, human_time

_PLAIN_SECONDS = 15.0


class Progress:
    """Reports units done out of a total, with rate and time left.

    The work consists of parts (input files, say). ``total``, the size of a part and the argument
    of :meth:`update` share a unit (bytes); ``items`` are what the rate counts, and ``units`` what a
    second rate counts, if there is one.
    """

    def __init__(
        self,
        *,
        label: str,
        total: int,
        items: str,
        units: str = "",
        stream: TextIO | None = None,
    ) -> None:
        self._label = label
        self._total = max(total, 1)
        self._items = items
        self._units = units
        self._console = Console(stream=stream if stream is not None else sys.stderr)
        self._begin = time.monotonic()
        self._last = self._begin
        self._skipped = 0
        self._before = 0
        self._size = 0
        self._items_before = 0
        self._count = 0
        self._units_before = 0
        self._unit_count = 0

    def skip(self, amount: int) -> None:
        """Count work that was done in an earlier run: it is progress, but tells no speed."""
        self._skipped += amount

    def begin(self, *, size: int) -> None:
        """Start a part of ``size``; earlier parts are done, whatever was last reported."""
        self._before += self._size
        self._size = size
        self._items_before += self._count
        self._units_before += self._unit_count
        self._count = self._unit_count = 0

    def update(self, done: int, *, items: int, units: int = 0) -> None:
        """``done`` of the current part so far, ``items`` and ``units`` produced by it so far."""
        self._count, self._unit_count = items, units
        self._show(done)

    def update_all(self, done: int, *, items: int, units: int = 0) -> None:
        """Where parts go on side by side: ``done`` of all of them so far, and all ``items`` and
        ``units``."""
        self._size, self._count, self._unit_count = done, items, units
        self._show(done)

    def _show(self, done: int) -> None:
        now = time.monotonic()
        if self._console.live:
            self._console.progress(self._line(done, seconds=now - self._begin))
        elif now - self._last >= _PLAIN_SECONDS:
            self._last = now
            self._console.line(self._line(done, seconds=now - self._begin))

    def close(self) -> None:
        """Leave the last line standing."""
        self._console.close()

    def _line(self, done: int, *, seconds: float) -> str:
        done = self._before + min(done, self._size)
        share = min((done + self._skipped) / self._total, 1.0)
        count = self._items_before + self._count
        left = seconds * max(self._total - self._skipped - done, 0) / done if done else 0.0
        rates = f"{human_count(count / max(seconds, 1e-9))} {self._items}/s"
        if self._units:
            units = (self._units_before + self._unit_count) / max(seconds, 1e-9)
            rates += f"  {human_count(units)} {self._units}/s"
        return (
            f"{self._label} {share:4.0%}  {count} {self._items}  {rates}  {human_time(left)} left"
        )
