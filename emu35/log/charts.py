"""Line charts as SVG text: no library, no script, nothing to load."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape

from emu35.log.console import human_count

COLOURS = ("#2f6fde", "#d9480f", "#2b8a3e", "#9c36b5", "#087f5b", "#c2255c", "#846358")
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 16, 38
_CHARACTER = 8
"""About the width of one on an axis."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Points (x, y) under a name; ``marked`` draws a dot at each. The legend shows ``newest``, or
    without it the last y."""

    name: str
    points: list[tuple[float, float]]
    marked: bool = False
    newest: float | None = None


def line_chart(
    series: list[Series],
    *,
    x_label: str,
    title: str,
    lowest: float | None = 0.0,
    highest: float | None = None,
) -> str:
    """An ``<figure>`` with one chart; series without points are left out.

    The vertical axis reaches down to ``lowest`` at least; None lets it begin at the smallest y. It
    ends above ``highest``, and what lies higher is drawn at its upper edge; None shows everything.
    """
    series = [item for item in series if item.points]
    if not series:
        return ""
    drawn = _lines(series, x_label=x_label, lowest=lowest, highest=highest)
    legend = "".join(
        f'<span><i style="background:{COLOURS[index % len(COLOURS)]}"></i>'
        f"{escape(item.name)} <b>{_newest(item)}</b></span>"
        for index, item in enumerate(series)
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'{drawn}</svg><div class="legend">{legend}</div></figure>'
    )


def line_charts_svg(
    charts: Mapping[str, list[Series]], *, x_label: str, lowest: float | None = 0.0
) -> str:
    """An SVG file for pages that load pictures only: charts (title -> series, each with points)
    side by side, and below them one legend, for all have the same series in the same order."""
    height = TOP + HEIGHT + TOP + 2 * _CHARACTER
    parts: list[str] = []
    for place, (title, series) in enumerate(charts.items()):
        drawn = _lines(series, x_label=x_label, lowest=lowest, highest=None)
        parts.append(
            f'<g transform="translate({place * WIDTH} {TOP})">'
            f'<text x="{LEFT}" y="4" class="title">{escape(title)}</text>{drawn}</g>'
        )
    names = [item.name for item in next(iter(charts.values()))]
    wide = WIDTH * len(charts)
    for index, name in enumerate(names):
        x, y = LEFT + index * (wide - LEFT) // len(names), height - _CHARACTER
        parts.append(
            f'<rect x="{x}" y="{y - 10}" width="10" height="10" '
            f'fill="{COLOURS[index % len(COLOURS)]}"/>'
            f'<text x="{x + 16}" y="{y}">{escape(name)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {height}" '
        f'width="{wide}" height="{height}"><style>{_SVG_STYLE}</style>'
        f'<rect width="{wide}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _lines(
    series: list[Series], *, x_label: str, lowest: float | None, highest: float | None
) -> str:
    """Grid and lines, as the content of an SVG of ``WIDTH`` x ``HEIGHT``."""
    xs = [x for item in series for x, _ in item.points]
    ys = [y for item in series for _, y in item.points]
    floor = min(ys) if lowest is None else min(lowest, *ys)
    ceiling = max(ys) if highest is None else min(highest, max(ys))
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(floor, max(floor, ceiling))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (min(y, y_high) - y_low) / (y_high - y_low)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_grid(x_ticks, y_ticks, place=place, x_range=(x_low, x_high), x_label=x_label)]
    for index, item in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        placed = [place(x, y) for x, y in item.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" '
            f'stroke-linejoin="round"{_dashes(index)}/>'
        )
        if item.marked:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed
            ]
    return "".join(parts)


def _newest(item: Series) -> str:
    return f"{item.points[-1][1] if item.newest is None else item.newest:.4g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A bar of a chart: what it stands for, how high it is, and words shown for the pointer."""

    name: str
    value: float
    said: str = ""


def bar_chart(bars: list[Bar], *, x_label: str, title: str) -> str:
    """A ``<figure>`` with upright bars from zero, evenly spaced in their order, each with its name
    below; without bars, nothing."""
    if not bars:
        return ""
    highest = max(bar.value for bar in bars)
    ticks = _ticks(0.0, highest)
    step = (WIDTH - LEFT - RIGHT) / len(bars)
    # As many names as there is room for.
    every = math.ceil(max(len(bar.name) for bar in bars) * _CHARACTER / step)

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x * step, HEIGHT - BOTTOM - y / ticks[-1] * (HEIGHT - TOP - BOTTOM)

    parts = [_grid([], ticks, place=place, x_range=(0, len(bars)), x_label=x_label)]
    for index, bar in enumerate(bars):
        (x, top), (_, bottom) = place(index + 0.1, bar.value), place(index, 0.0)
        parts.append(
            f'<rect x="{x:.1f}" y="{top:.1f}" width="{0.8 * step:.1f}" '
            f'height="{bottom - top:.1f}" fill="{COLOURS[0]}">'
            f"<title>{escape(bar.said or f'{bar.name}: {bar.value:g}')}</title></rect>"
        )
        if index % every == 0:
            parts.append(
                f'<text x="{x + 0.4 * step:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">'
                f"{escape(bar.name)}</text>"
            )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def chart_page(charts: str, *, title: str, lead: str, above: str = "", below: str = "") -> str:
    """A whole page that shows ``charts``, figures of :func:`line_chart`, below a title and a few
    words, with HTML ``above`` and ``below`` them; one file, to be opened anywhere."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>{escape(lead)}</p>"
        f'{above}<div class="charts">{charts}</div>{below}</body></html>\n'
    )


def _dashes(index: int) -> str:
    """Colours repeat; lines of the second round and later are dashed."""
    turn = index // len(COLOURS)
    return f' stroke-dasharray="{3 * turn} 3"' if turn else ""


def _grid(
    x_ticks: list[float],
    y_ticks: list[float],
    *,
    place: Callable[[float, float], tuple[float, float]],
    x_range: tuple[float, float],
    x_label: str,
) -> str:
    x_low, x_high = x_range
    parts: list[str] = []
    for tick in y_ticks:
        x, y = place(x_low, tick)
        parts.append(
            f'<line x1="{x:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, y = place(tick, y_ticks[0])
            parts.append(
                f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{_number(tick)}</text>'
            )
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end" class="label">'
        f"{escape(x_label)}</text>"
    )
    return "".join(parts)


def _number(tick: float) -> str:
    """Short enough for the margin."""
    return human_count(tick) if abs(tick) >= 1e4 else f"{tick:g}"


def _ticks(low: float, high: float, *, wanted: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    if high - low <= 1e-6 * abs(high):
        high = low + (abs(low) or 1)
    raw = (high - low) / wanted
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    # Twelve digits, wherever they begin: learning rates are small.
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def smooth(points: list[tuple[float, float]], *, window: int = 1) -> list[tuple[float, float]]:
    """Each y as the mean of itself and up to ``window`` - 1 predecessors."""
    smoothed: list[tuple[float, float]] = []
    for index, (x, _) in enumerate(points):
        last = [y for _, y in points[max(0, index - window + 1) : index + 1]]
        smoothed.append((x, sum(last) / len(last)))
    return smoothed


_STYLE = """
:root { --ink: #1c2430; --soft: #5d6876; --line: #e3e7ec; --card: #fff; --ground: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #98a3b3; --line: #2c3440; --card: #171c24; --ground: #10141a; }
}
body { margin: 0 auto; max-width: 1240px; padding: 32px 24px; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; }
p { margin: 4px 0 18px; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 16px; }
figure { margin: 0; padding: 14px 16px; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--line); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 6px; }
"""

_SVG_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #5d6876; }
.title { font-size: 14px; font-weight: 600; fill: #1c2430; }
.grid { stroke: #e3e7ec; }
"""
