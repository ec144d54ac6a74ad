"""What an evaluation hands to people: one table, as Markdown and in a page with plots, and pictures
of the first prompts side by side."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from emu35.config import RunConfig
from emu35.config.dida_eval import DiDAEvalConfig
from emu35.data.scenes.quality import SceneQuality, Share
from emu35.log.charts import Series, chart_page, line_chart
from emu35.stages.dida_eval.decoders import DecoderRow
from emu35.stages.dida_eval.rows import row_facts
from emu35.stages.picture_features import Picture

SCALE = 128
"""Pixels that the shorter side of a picture is enlarged to, in whole multiples, for strips."""

CLEAN = "clean"
"""Where losses by time have that of codes predicted one after another."""

_STYLE = """<style>
table { border-collapse: collapse; margin: 0 0 18px; font-size: 12px; display: block;
  overflow-x: auto; }
th, td { padding: 4px 7px; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
td:nth-child(-n+3) { white-space: nowrap; }
.strip { margin: 16px 0; } .strip img { max-width: 100%; image-rendering: pixelated; }
</style>"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distances:
    """Frechet distances of a row's pictures: to those of the first row, drawn token by token (None
    for itself), and to true pictures; None where there are too few."""

    to_ar: float | None = None
    to_true: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of the table: a decoder, or (``row`` None) what nobody can surpass."""

    name: str
    quality: SceneQuality
    row: DecoderRow | None = None
    distances: Distances = field(default_factory=Distances)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Everything that was measured.

    ``lines`` begin with the first decoding token by token; ``losses`` are by validation set and
    then by time, with :data:`CLEAN` for codes predicted one after another; ``notes`` say what is
    missing and why; ``facts`` what it was measured on.
    """

    lines: Sequence[Line]
    losses: Mapping[str, Mapping[str, float | None]]
    notes: Sequence[str]
    facts: Mapping[str, Any]

    @property
    def reference(self) -> DecoderRow:
        """The row that times are compared with."""
        first = self.lines[0].row
        assert first is not None
        return first

    def to_json(self) -> dict[str, Any]:
        """Every number, JSON-ready."""
        lines: list[dict[str, Any]] = []
        for line in self.lines:
            facts: dict[str, Any] = {"name": line.name}
            facts |= row_facts(line.row) if line.row else {"quality": asdict(line.quality)}
            if line.row is not None:
                facts["speedup"] = self.reference.seconds / line.row.seconds
            facts |= {"frechet_ar": line.distances.to_ar, "frechet_true": line.distances.to_true}
            lines.append(facts)
        losses = {name: dict(by_time) for name, by_time in self.losses.items()}
        return {**self.facts, "rows": lines, "losses": losses, "notes": list(self.notes)}


HEAD = (
    *("decoder", "accuracy", "right", "count", "colour", "shape", "size", "place"),
    *("forwards", "tokens", "seconds", "speed", "CPU s", "to AR", "to true"),
)


def table_cells(evaluation: Evaluation) -> list[list[str]]:
    """The table's lines below :data:`HEAD`."""
    return [_cells(line, reference=evaluation.reference) for line in evaluation.lines]


def _cells(line: Line, *, reference: DecoderRow) -> list[str]:
    quality, row = line.quality, line.row
    parts = quality.parts
    shares = (parts.count, parts.colour, parts.shape, parts.size, parts.place)
    return [
        line.name,
        _share(quality.accuracy),
        _share(quality.right),
        *(f"{100 * value:.1f}" for value in shares),
        f"{row.forwards:.1f}" if row else "",
        f"{row.tokens:.0f}" if row else "",
        f"{row.seconds:.4f}" if row else "",
        f"{reference.seconds / row.seconds:.2f}x" if row else "",
        f"{row.cpu_seconds:.4f}" if row else "",
        _number(line.distances.to_ar),
        _number(line.distances.to_true),
    ]


def _share(share: Share) -> str:
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


LEGEND = (
    "accuracy: right attributes (colour, shape, size, place) of all asked for, in percent with a "
    "95% interval bootstrapped over prompts. right: prompts whose picture has as many objects as "
    "asked for, each of the right colour in the right place, with Wilson's 95% interval. forwards, "
    "tokens fed (both streams of guidance), seconds and CPU seconds (of the process, on all its "
    "cores) are of one picture, times within a batch. speed: against the first line, by seconds; "
    "that of the same decoder with another seed tells how quiet the machine was. "
    "to AR, to true: Frechet distance to the pictures of the first line and to true ones."
)


def table_markdown(evaluation: Evaluation) -> str:
    """``table.md``."""
    lines = [f"# {evaluation.facts['source']}", "", _summary(evaluation), ""]
    lines += [f"| {' | '.join(HEAD)} |", f"|---|{'---:|' * (len(HEAD) - 1)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in table_cells(evaluation)]
    for name, by_time in evaluation.losses.items():
        times = list(by_time)
        lines += ["", f"Loss of codes on {name}, nats, by time", ""]
        lines += [f"| {' | '.join(times)} |", f"|{'---:|' * len(times)}"]
        lines.append(f"| {' | '.join(_number(value) for value in by_time.values())} |")
    lines += ["", LEGEND, *(f"\n{note}" for note in evaluation.notes)]
    return "\n".join(lines) + "\n"


def _summary(evaluation: Evaluation) -> str:
    facts, row = evaluation.facts, evaluation.reference
    return (
        f"{row.quality.prompts} prompts of {facts['prompts']}, pictures of "
        f"{facts['size'][0]} x {facts['size'][1]} codes, {row.batch_size} at a time on "
        f"{facts['device']}, step {facts['step']}, guidance {facts['guidance']}, temperature "
        f"{facts['temperature']}, seed {facts['seed']}; distances between features of the "
        f"{facts['features']}."
    )


def page(evaluation: Evaluation, *, strips: Sequence[tuple[str, bytes]]) -> str:
    """``evaluation.html``: table, plots and ``strips``, each a prompt and a PNG file."""
    head = "".join(f"<th>{escape(name)}</th>" for name in HEAD)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for cells in table_cells(evaluation)
    )
    words = "".join(f"<p>{escape(text)}</p>" for text in (LEGEND, *evaluation.notes))
    shown = "".join(
        f'<figure class="strip"><figcaption>{escape(prompt)}</figcaption><img alt="" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
        for prompt, png in strips
    )
    names = ["true picture", *(line.name for line in evaluation.lines if line.row)]
    order = f"<p>From the left: {escape(', '.join(names))}.</p>" if strips else ""
    return chart_page(
        plots(evaluation),
        title=f"Parallel decoding of {evaluation.facts['source']}",
        lead=_summary(evaluation),
        above=f"{_STYLE}<table><tr>{head}</tr>{body}</table>{words}",
        below=order + shown,
    )


def plots(evaluation: Evaluation) -> str:
    """Quality against steps and against time, distance against steps, loss by time."""
    decoders = [line for line in evaluation.lines if line.row]
    percent: dict[str, Callable[[Line], float | None]] = {
        "Right attributes, %": lambda line: 100 * line.quality.accuracy.value,
        "Right pictures, %": lambda line: 100 * line.quality.right.value,
    }
    distance: dict[str, Callable[[Line], float | None]] = {
        "Frechet distance to pictures drawn token by token": lambda line: line.distances.to_ar,
        "Frechet distance to true pictures": lambda line: line.distances.to_true,
    }
    charts = [
        chart
        for title, value in {**percent, **distance}.items()
        for chart in (
            line_chart(_by_steps(decoders, value=value), x_label="steps", title=title),
            line_chart(
                _by_time(decoders, value=value), x_label="ms per picture", title=f"{title}, by time"
            ),
        )
    ]
    charts.append(
        line_chart(
            _losses(evaluation),
            x_label="t",
            title="Loss of codes in noisy copies, nats (level line: one after another)",
        )
    )
    return "".join(charts)


def _by_steps(decoders: Sequence[Line], *, value: Callable[[Line], float | None]) -> list[Series]:
    """A curve a sampler, and a level line for each decoding token by token."""
    curves = _curves(decoders, value=value, x=lambda row: float(row.steps or 0))
    steps = [line.row.steps for line in decoders if line.row and line.row.steps]
    for line in decoders:
        level = value(line)
        if line.row and line.row.steps is None and level is not None and steps:
            points = [(float(min(steps)), level), (float(max(steps)), level)]
            curves.append(Series(name=line.name, points=points))
    return curves


def _by_time(decoders: Sequence[Line], *, value: Callable[[Line], float | None]) -> list[Series]:
    """A curve a sampler, in the order of its steps, and a point for each decoding token by
    token."""
    curves = _curves(decoders, value=value, x=lambda row: 1000 * row.seconds)
    for line in decoders:
        level = value(line)
        if line.row and line.row.steps is None and level is not None:
            points = [(1000 * line.row.seconds, level)]
            curves.append(Series(name=line.name, points=points, marked=True))
    return curves


def _curves(
    decoders: Sequence[Line],
    *,
    value: Callable[[Line], float | None],
    x: Callable[[DecoderRow], float],
) -> list[Series]:
    """One a sampler, its points in the order of their steps."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for line in decoders:
        row, y = line.row, value(line)
        if row and row.sampler is not None and row.steps is not None and y is not None:
            found.setdefault(row.sampler, {})[row.steps] = (x(row), y)
    return [
        Series(name=name, points=[points[steps] for steps in sorted(points)], marked=True)
        for name, points in found.items()
    ]


def _losses(evaluation: Evaluation) -> list[Series]:
    series: list[Series] = []
    for name, by_time in evaluation.losses.items():
        points = [
            (float(time), loss)
            for time, loss in by_time.items()
            if time != CLEAN and loss is not None
        ]
        series.append(Series(name=name, points=sorted(points), marked=True))
        clean = by_time.get(CLEAN)
        if clean is not None and points:
            ends = [(min(points)[0], clean), (max(points)[0], clean)]
            series.append(Series(name=f"{name}, one after another", points=ends))
    return series


def strip(pictures: Sequence[Picture | None], *, like: Picture) -> bytes:
    """A PNG of ``pictures`` in a row, each as large as ``like`` or grey where there is none."""
    height, width = like.shape[:2]
    factor = max(1, SCALE // min(height, width))
    gap = max(2, min(height, width) * factor // 32)
    cell = (width * factor, height * factor)
    sheet = Image.new("RGB", (len(pictures) * (cell[0] + gap) - gap, cell[1]), (128, 128, 128))
    for at, image_HW3 in enumerate(pictures):
        if image_HW3 is not None:
            image = Image.fromarray(np.ascontiguousarray(image_HW3))
            sheet.paste(image.resize(cell, Image.Resampling.NEAREST), (at * (cell[0] + gap), 0))
    stream = io.BytesIO()
    sheet.save(stream, format="PNG")
    return stream.getvalue()


def facts_of(config: RunConfig, *, step: int, device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    stage = config.stage
    assert isinstance(stage, DiDAEvalConfig)
    return {
        "source": stage.init_from,
        "step": step,
        "prompts": stage.prompts,
        "seed": config.seed,
        "size": list(stage.size),
        "guidance": stage.guidance,
        "temperature": stage.temperature,
        "features": str(stage.features),
        "device": device,
    }
