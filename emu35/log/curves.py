"""``curves.html``: what the run has reported so far, drawn; one file, to be opened anywhere.

It is made again after every validation and at the end. However long the run, a series is kept in a
bounded number of points, so that neither memory nor the page grows with it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from emu35.files import write_atomically
from emu35.log.charts import Series, chart_page, line_chart, smooth
from emu35.log.jsonl import Row, is_validation, read_rows

CURVES_FILE = "curves.html"
MOST_POINTS = 800
"""Twice as many pixels as a chart is wide would not show more."""

_LEFT_OUT = ("step", "tokens_total")
_FAMILIES: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("Loss", lambda key: key == "loss"),
    ("Loss by modality", lambda key: key in ("loss_text", "loss_visual")),
    ("Loss by source", lambda key: key.startswith("loss/")),
    ("Learning rate", lambda key: key == "lr"),
    ("Gradient norm", lambda key: key == "grad_norm"),
    ("Share of the loss weight by source", lambda key: key.startswith("share/")),
    ("Share of the rows that holds tokens", lambda key: key == "data/fill"),
    ("Tokens by source", lambda key: key.startswith("data/tokens/")),
    ("Documents by source", lambda key: key.startswith("data/documents/")),
    ("Passes over the documents by source", lambda key: key.startswith("data/epoch/")),
    ("Share of the time by phase", lambda key: key.startswith("time/")),
)
"""Metrics drawn together, and in which order; every other metric gets a chart of its own."""


@dataclass(kw_only=True, slots=True)
class Track:
    """One metric over the steps, in at most ``MOST_POINTS`` points.

    When there are more, neighbours become their mean, and from then on every point stands for
    twice as many values. What a track holds depends on the values alone, not on when they came, so
    a resumed run draws what an uninterrupted one does.
    """

    points: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    newest: float = math.nan
    last_step: float = -1.0
    stride: int = 1
    _sum: float = 0.0
    _count: int = 0

    def add(self, step: float, value: float) -> None:
        """Append a value; one of a step that is already there is the same and is left out."""
        if step <= self.last_step:
            return
        self.last_step, self.newest = step, value
        self._sum += value
        self._count += 1
        if self._count == self.stride:
            self.points.append((step, self._sum / self._count))
            self._sum, self._count = 0.0, 0
        if len(self.points) >= MOST_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(x, (first + y) / 2) for (_, first), (x, y) in pairs]
            self.stride *= 2

    def drawn(self) -> list[tuple[float, float]]:
        """The points up to the last step."""
        rest = [(self.last_step, self._sum / self._count)] if self._count else []
        return [*self.points, *rest]


class CurvesFile:
    """A :class:`~emu35.log.sinks.Sink` that draws; it begins with the rows that are there."""

    def __init__(self, *, run_dir: Path, metrics: Path, name: str, total_steps: int) -> None:
        self._path, self._name, self._total = run_dir / CURVES_FILE, name, total_steps
        self._tracks: dict[str, Track] = {}
        for row in read_rows(metrics):
            self._add(row)

    def write(self, row: Row) -> None:
        self._add(row)
        if is_validation(row):
            self._draw()

    def flush(self) -> None:
        """The page is a view; it follows at the next validation."""

    def close(self) -> None:
        self._draw()

    def _add(self, row: Row) -> None:
        step = float(row["step"] or 0)
        for key, value in row.items():
            # A value that is none (NaN in the row) leaves the curve where it was.
            if key not in _LEFT_OUT and value is not None and math.isfinite(value):
                self._tracks.setdefault(key, Track()).add(step, float(value))

    def _draw(self) -> None:
        if self._tracks:
            page = draw_page(self._tracks, name=self._name, total_steps=self._total)
            write_atomically(self._path, content=page.encode())


def draw_page(tracks: dict[str, Track], *, name: str, total_steps: int) -> str:
    """The whole page of a run called ``name``."""
    step = int(max(track.last_step for track in tracks.values()))
    charts = "".join(_charts(tracks))
    lead = (
        f"Step {step:,} of {total_steps:,}. Bold: the newest value. "
        "Language losses are in nats a token; what exceeds a chart lies on its upper edge."
    )
    return chart_page(charts, title=name, lead=lead)


def _charts(tracks: dict[str, Track]) -> Iterable[str]:
    left = dict(tracks)
    families: dict[str, dict[str, Track]] = {}
    for title, belongs in _FAMILIES[:3]:
        families[title] = {key: left.pop(key) for key in tracks if belongs(key)}
    for key in [key for key in left if key.startswith("val/")]:
        metric = key.rsplit("/", 1)[1]
        title = "Validation loss" if metric == "loss" else f"Validation: {_words(metric)}"
        families.setdefault(title, {})[key] = left.pop(key)
    for title, belongs in _FAMILIES[3:]:
        families[title] = {key: left.pop(key) for key in list(left) if belongs(key)}
    for key in left:
        families.setdefault(_family(key), {})[key] = tracks[key]
    for title, members in families.items():
        series = [_series(key, track) for key, track in members.items()]
        if title.startswith(("Loss", "Validation")):
            highest = _settled(series)
            yield line_chart(series, x_label="step", title=title, lowest=None, highest=highest)
        else:
            yield line_chart(series, x_label="step", title=title)


def _family(key: str) -> str:
    """The title of the chart for a metric that belongs to no fixed family: rewards by task with
    their parts, what is told of text and of pictures beside what holds for both."""
    match key.split("/"):
        case ["reward"] | ["reward", _]:
            return "Reward"
        case ["reward", task, _]:
            return f"Reward of {_words(task)}"
        case ["heldout", *_]:
            return "Held-out rewards"
        case _:
            return _words(key.removesuffix("_text").removesuffix("_visual"))


def _settled(series: list[Series]) -> float | None:
    """The largest value after the first twentieth of every long series: the beginning of a loss is
    many times what it falls to, and would flatten the rest. None if all are short."""
    late = [y for item in series for _, y in item.points[len(item.points) // 20 :]]
    return max(late) if any(len(item.points) >= 40 for item in series) else None


def _series(key: str, track: Track) -> Series:
    points = track.drawn()
    name = _series_name(key)
    if key.startswith("loss"):
        points = smooth(points, window=1 + len(points) // 60)
    return Series(
        name=_words(name),
        points=points,
        marked=key.startswith("val/") and len(points) <= 40,
        newest=track.newest,
    )


def _series_name(key: str) -> str:
    """What the title of its chart does not say: the set, the source, the reward."""
    parts = key.split("/")
    if parts[0] == "val" and len(parts) > 2:
        return "/".join(parts[1:-1])
    if parts[0] == "data":
        return "/".join(parts[2:]) or parts[-1]
    if parts[0] == "reward" and len(parts) > 1:
        return parts[-1]
    return "/".join(parts[1:]) or key


def _words(key: str) -> str:
    return key.replace("_", " ")
