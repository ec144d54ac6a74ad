"""What a person watching the run sees."""

import os
import shutil
import time
from typing import TextIO

_REDRAW_SECONDS = 0.1


class Console:
    """Progress on a terminal as one line redrawn in place; elsewhere only whole lines.

    A reader that goes away (a closed pipe or terminal) silences the console and nothing else:
    an exception on this rank alone would leave the other ranks waiting in a collective.
    """

    def __init__(self, *, stream: TextIO) -> None:
        self._stream: TextIO | None = stream
        self.live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn = False
        self._last_draw = 0.0

    def line(self, text: str) -> None:
        """Print ``text`` on a line of its own, above the progress line."""
        self._write(f"{self._clear()}{text}\n")
        self._drawn = False

    def progress(self, text: str, *, force: bool = False) -> None:
        """Redraw the progress line; at most ten times a second unless ``force``."""
        now = time.perf_counter()
        if not self.live or (now - self._last_draw < _REDRAW_SECONDS and not force):
            return
        # One column stays free: a terminal that wraps would turn "in place" into a scroll.
        width = shutil.get_terminal_size().columns - 1
        self._write(self._clear() + text[:width])
        self._drawn, self._last_draw = True, now

    def close(self) -> None:
        """Leave the last progress line standing and the cursor below it."""
        if self._drawn:
            self._write("\n")
            self._drawn = False

    def _clear(self) -> str:
        return "\r\x1b[K" if self._drawn else ""

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # broken pipe, vanished terminal; closed stream
            self._stream = None
            self.live = False


def human_time(seconds: float) -> str:
    """``h:mm:ss`` above an hour, ``m:ss`` below."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def human_count(number: float) -> str:
    """Three or four digits and a unit: 950, 12.3k, 4.56M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}" if number < 1e3 * size else f"{number:.3g}"
    return f"{number:.0f}" if abs(number) >= 10 else f"{number:.3g}"
