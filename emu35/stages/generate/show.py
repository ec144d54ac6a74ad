"""What a person sees while answers come: text as it is said, pictures row by row, and the rate."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from emu35.inference.grammar import GridSize
from emu35.inference.progress import (
    Event,
    ImageBegun,
    ImageDone,
    ImageProgress,
    Problem,
    Progress,
    TextPiece,
    ThoughtPiece,
)
from emu35.inference.request import Request, Update
from emu35.log.console import Console, human_count, human_time
from emu35.tokens.text import TextTokenizer

REPORT_SECONDS = 10.0
"""Between two lines of progress where there is no terminal to redraw."""

SavePicture: TypeAlias = Callable[[int, NDArray[np.integer]], Path]
"""Writes the next image [H, W] of an answer (by index); its path."""

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROLS = {code: shown for code, shown in _CONTROLS.items() if chr(code) not in "\n\t"}
"""A model must not move the cursor or retitle the window of whoever reads it."""


class ImageClock:
    """How far an image is, and how long the rest will take at its own pace."""

    def __init__(self, *, number: int, size: GridSize) -> None:
        self.number = number
        self.rows = 0
        self._size = size
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the image began."""
        return time.perf_counter() - self._began

    def __str__(self) -> str:
        height = self._size.height
        text = f"image {self.number + 1} ({self._size})  row {self.rows}/{height}"
        if not self.rows:
            return text
        left = self.seconds / self.rows * (height - self.rows)
        return f"{text}  {human_time(left)} left"


class Pace:
    """Lines of progress: redrawn on a terminal, every ten seconds elsewhere."""

    def __init__(self, *, console: Console) -> None:
        self._console = console
        self._reported = time.perf_counter()

    def show(self, text: str) -> None:
        """The newest progress."""
        self._console.progress(text)
        if not self._console.live and time.perf_counter() - self._reported > REPORT_SECONDS:
            self._console.line(text)
            self._reported = time.perf_counter()


class ManyAnswers:
    """Progress over many prompts: how many are done, the image furthest behind, tokens a second and
    the longest time that can remain."""

    def __init__(
        self,
        *,
        console: Console,
        requests: Sequence[Request],
        tokenizer: TextTokenizer,
        save: SavePicture,
    ) -> None:
        self._pace = Pace(console=console)
        self._progress = [Progress(tokenizer) for _ in requests]
        self._clocks: dict[int, ImageClock] = {}
        self._save = save
        self._most_tokens = sum(request.max_new_tokens for request in requests)
        self._done = self._tokens = 0
        self._began = time.perf_counter()

    def update(self, update: Update) -> None:
        """Take what one request has gained."""
        self._tokens += len(update.tokens)
        for event in self._progress[update.index].feed(update.tokens):
            self._take(event, update=update)
        if update.finished is not None:
            self._done += 1
            self._clocks.pop(update.index, None)

    def step(self) -> None:
        """Show the progress after a step of the engine."""
        rate = self._tokens / max(time.perf_counter() - self._began, 1e-9)
        left = (self._most_tokens - self._tokens) / max(rate, 1e-9)
        text = f"generate  {self._done}/{len(self._progress)} prompts"
        if self._clocks:
            index = min(self._clocks)
            text += f"  prompt {index}: {self._clocks[index]}"
        self._pace.show(
            f"{text}  {human_count(rate)} tokens/s  at most {human_time(left)} left in all"
        )

    def _take(self, event: Event, *, update: Update) -> None:
        index = update.index
        if isinstance(event, ImageBegun):
            self._clocks[index] = ImageClock(number=event.number, size=event.size)
        elif isinstance(event, ImageProgress) and index in self._clocks:
            self._clocks[index].rows = event.rows_done
        elif isinstance(event, ImageDone):
            self._clocks.pop(index, None)
            if update.finished is None:
                self._save(index, event.codes_HW)


class OneAnswer:
    """One answer while it comes: its text on ``out``, its images as progress and then as files.

    Thoughts stand between marks, so that they are not taken for the answer. A reader who has seen
    enough (``| head``) or an output that is full ends the printing and nothing else: the answer and
    its files are made all the same.
    """

    def __init__(
        self, *, console: Console, out: TextIO, tokenizer: TextTokenizer, save: SavePicture
    ) -> None:
        self._console = console
        self._pace = Pace(console=console)
        self._out: TextIO | None = out
        self._progress = Progress(tokenizer)
        self._clock: ImageClock | None = None
        self._save = save
        self._thinking = False
        self._column = 0  # 0: the cursor is at the beginning of a line

    def update(self, update: Update) -> None:
        """Take what the request has gained, and its end."""
        for event in self._progress.feed(update.tokens):
            self._take(event, update=update)
        if update.finished is not None:
            for event in self._progress.finish():
                self._take(event, update=update)
            self._end_line()

    def step(self) -> None:
        """Show how far the present image is."""
        if self._clock is not None:
            self._pace.show(str(self._clock))

    def _take(self, event: Event, *, update: Update) -> None:
        if isinstance(event, TextPiece):
            self._mark(thinking=False)
            self._write(event.text)
        elif isinstance(event, ThoughtPiece):
            self._mark(thinking=True)
            self._write(event.text)
        elif isinstance(event, ImageBegun):
            self._end_line()
            self._clock = ImageClock(number=event.number, size=event.size)
        elif isinstance(event, ImageProgress) and self._clock is not None:
            self._clock.rows = event.rows_done
        elif isinstance(event, ImageDone):
            self._end_image(event, update=update)
        elif isinstance(event, Problem):
            self._end_line()
            self._clock = None
            self._console.line(event.reason)

    def _end_image(self, event: ImageDone, *, update: Update) -> None:
        path = self._save(update.index, event.codes_HW)
        height, width = event.codes_HW.shape
        took = f" in {human_time(self._clock.seconds)}" if self._clock else ""
        self._console.line(f"image {event.number + 1}: {height}*{width} codes{took} -> {path}")
        self._clock = None

    def _mark(self, *, thinking: bool) -> None:
        if thinking != self._thinking:
            self._end_line()
            self._write("[thinking] " if thinking else "[answer] ")
            self._thinking = thinking

    def _end_line(self) -> None:
        if self._column:
            self._write("\n")

    def _write(self, text: str) -> None:
        if self._out is None:
            return
        try:
            self._out.write(text.translate(_CONTROLS))
            self._out.flush()
        except OSError:  # what still lies in the buffer fails again, for the command line to tell
            self._out = None
            return
        self._column = 0 if text.endswith("\n") else 1
