"""``report.html``: one file with everything in it, to be opened anywhere."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from emu35.log.charts import Series, line_chart, smooth
from emu35.log.jsonl import read_rows
from steps import duration

SHOWN_PICTURES = 36
"""Generated pictures in the report; all of them are in the folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """A picture and what the image tokenizer makes of it."""

    name: str
    original: Image.Image
    decoded: Image.Image


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the page shows; ``summary`` is that of ``summary.json``, ``tasks`` the section on
    fine-tuning, ``parallel`` that on parallel decoding,
    ``rewarded`` that on reinforcement learning."""

    summary: dict[str, Any]
    evaluation: dict[str, Any]
    reconstructions: Sequence[Reconstruction]
    tokenizer_run: Path
    pretrain_run: Path
    sft_run: Path
    generated: Path
    tasks: str
    parallel: str
    rewarded: str
    commands: Sequence[str]

    def html(self) -> str:
        """The whole page."""
        style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
        sections = [
            self._head(),
            self._generated(),
            self.tasks,
            self.parallel,
            self.rewarded,
            self._curves(),
            self._reconstructions(),
            self._accuracy(),
            self._times(),
            self._commands(),
        ]
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>emu35 demo</title><style>{style}</style></head><body>"
            f"{''.join(sections)}</body></html>\n"
        )

    def _head(self) -> str:
        summary = self.summary
        cards = [
            (f"{summary['colour_accuracy']:.0%}", f"colour; chance {summary['colour_chance']:.0%}"),
            (f"{summary['shape_accuracy']:.0%}", f"shape; chance {summary['shape_chance']:.0%}"),
            (f"{summary['count_accuracy']:.0%}", "right number of objects"),
            (
                f"{summary['tasks_sft']:.0%}",
                f"tasks answered right after fine-tuning; before {summary['tasks_pretrain']:.0%}",
            ),
            ("equal" if summary["release_logits_equal"] else "differ", "logits of the release"),
            (duration(summary["seconds"]), "for everything on this page"),
        ]
        return (
            "<h1>emu35 demo</h1><p>An image tokenizer and a language model of the Emu3.5 "
            "architecture, trained from nothing on this machine, then asked to draw captions "
            "that neither has seen. A program without any learned part reads the drawings back."
            '</p><div class="cards">'
            + "".join(
                f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>'
                for big, small in cards
            )
            + "</div>"
        )

    def _generated(self) -> str:
        prompts = self.evaluation["prompts"]
        tiles = "".join(self._tile(prompt) for prompt in prompts[:SHOWN_PICTURES])
        return (
            f"<h2>Drawn from held-out captions</h2><p>The first {min(len(prompts), SHOWN_PICTURES)}"
            f" of {len(prompts)} prompts, in order. Below each caption, what the verifier read in "
            f'the picture.</p><div class="tiles">{tiles}</div>'
        )

    def _tile(self, prompt: dict[str, Any]) -> str:
        result = prompt["score"]
        picture = prompt["picture"]
        image = picture_tag(self.generated / picture) if picture else "<p>no picture</p>"
        marks = [
            (f"{name} {result[f'{name}_correct']}/{result['objects']}", all_right)
            for name in ("colour", "shape", "place")
            for all_right in [result[f"{name}_correct"] == result["objects"]]
        ]
        marks.append((f"{result['found']} found", result["count_correct"]))
        shown = "".join(
            f'<span class="{"yes" if right else "no"}">{escape(text)}</span>'
            for text, right in marks
        )
        read = "; ".join(prompt["found"]) or "nothing"
        return (
            f'<div class="tile"><div class="images">{image}</div>'
            f'<div class="caption" lang="{prompt["language"]}">{escape(prompt["prompt"])}</div>'
            f'<div class="read">{escape(read)}</div><div class="marks">{shown}</div></div>'
        )

    def _curves(self) -> str:
        charts = [
            line_chart(_trained(self.pretrain_run), x_label="step", title="Pretraining loss"),
            line_chart(
                _series(self.pretrain_run, prefix="val/", window=1),
                x_label="step",
                title="Validation loss",
            ),
            line_chart(
                _series(self.sft_run, prefix="loss/", window=5),
                x_label="step",
                title="Fine-tuning loss by task",
            ),
            line_chart(_trained(self.tokenizer_run), x_label="step", title="Image tokenizer loss"),
            line_chart(
                _series(self.tokenizer_run, prefix="val/psnr", window=1),
                x_label="step",
                title="Image tokenizer: PSNR of held-out pictures, dB",
            ),
            line_chart(
                _series(self.tokenizer_run, prefix="val/codebook_usage", window=1),
                x_label="step",
                title="Image tokenizer: share of codes in use",
            ),
        ]
        return (
            "<h2>Losses</h2><p>In nats a token for the language model: the mean of the last five "
            f'logged values, with the newest value in bold.</p><div class="charts">'
            f"{''.join(charts)}</div>"
        )

    def _reconstructions(self) -> str:
        tiles = "".join(
            f'<div class="tile"><div class="images">{picture_tag(pair.original)}'
            f'{picture_tag(pair.decoded)}</div><div class="read">{escape(pair.name)}</div></div>'
            for pair in self.reconstructions
        )
        return (
            "<h2>What the image tokenizer keeps</h2><p>Left the original, right the same picture "
            "after encoding to visual tokens and decoding. The scenes are held out.</p>"
            f'<div class="pairs">{tiles}</div>'
        )

    def _accuracy(self) -> str:
        evaluation = self.evaluation
        columns = [
            ("all prompts", evaluation["accuracy"]),
            ("one object", evaluation["accuracy_single"]),
            ("captions exchanged", evaluation["chance"]),
            ("uniform guess", evaluation["uniform"]),
        ]
        head = "".join(f"<th>{escape(name)}</th>" for name, _ in columns)
        rows = "".join(
            f"<tr><td>{name}</td>"
            + "".join(
                f"<td>{values[name]:.1%}</td>" if name in values else "<td></td>"
                for _, values in columns
            )
            + "</tr>"
            for name in ("colour", "shape", "place", "size", "count")
        )
        return (
            "<h2>Accuracy</h2><p>Share of objects with the right attribute; count: share of "
            "pictures. <i>Captions exchanged</i> scores the same pictures against the captions of "
            "others with as many objects: what a model reaches that draws well and ignores what "
            f"it is told.</p><table><tr><th></th>{head}</tr>{rows}</table>"
        )

    def _times(self) -> str:
        prefix = "seconds_"
        times = {
            key.removeprefix(prefix): value
            for key, value in self.summary.items()
            if key.startswith(prefix)
        }
        longest = max(times.values(), default=0.0) or 1.0
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(duration(seconds))}</td>"
            f'<td style="width:60%"><div class="bar" style="width:{seconds / longest:.1%}"></div>'
            "</td></tr>"
            for name, seconds in times.items()
        )
        return f"<h2>Time by step</h2><table>{rows}</table>"

    def _commands(self) -> str:
        versions = ", ".join(
            f"{key.removeprefix('version_')} {value}"
            for key, value in self.summary.items()
            if key.startswith("version_")
        )
        lines = "\n".join(escape(command) for command in self.commands)
        return f"<h2>Commands</h2><p>{escape(versions)}</p><pre>{lines}</pre>"


def picture_tag(source: Path | Image.Image) -> str:
    """An ``<img>`` with the picture in it."""
    if isinstance(source, Path):
        data = source.read_bytes()
    else:
        stream = io.BytesIO()
        source.save(stream, "PNG")
        data = stream.getvalue()
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _trained(run: Path) -> list[Series]:
    """Every ``loss`` of the training rows, smoothed."""
    return _series(run, prefix="loss", window=5)


def _series(run: Path, *, prefix: str, window: int) -> list[Series]:
    """The metrics whose name starts with ``prefix``."""
    rows = read_rows(run / "metrics.jsonl")
    return [
        Series(
            name=key.removeprefix("val/").removesuffix("/loss").replace("_", " "),
            points=smooth(_points(rows, key), window=window),
            marked=window == 1,
        )
        for key in _keys(rows)
        if key.startswith(prefix)
    ]


def _keys(rows: Iterable[dict[str, Any]]) -> list[str]:
    """In order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def _points(rows: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]
