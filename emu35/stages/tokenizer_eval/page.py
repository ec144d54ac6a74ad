"""``results.html``: tables, and originals beside their reconstructions; one file, to be opened
anywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emu35.log.charts import chart_page
from emu35.stages.inline import Picture, ascii_page, picture_tag, words
from emu35.stages.tokenizer_eval.measure import Resolution
from emu35.stages.tokenizer_eval.report import (
    Evaluation,
    lead,
    notes,
    table_head,
    table_lines,
)
from emu35.stages.tokenizer_eval.summary import Summaries

SIDE = 192
"""Pixels that small pictures are enlarged to, in whole multiples."""

MOST = 512
"""Pixels a side that are shown of a picture: its middle, pixel for pixel."""

_STYLE = """<style>
table { border-collapse: collapse; margin: 0 0 18px; font-size: 13px; display: block;
  overflow-x: auto; }
th, td { padding: 4px 9px; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, td:last-child { text-align: left; }
td:last-child, .facts { color: var(--soft); }
article { margin: 0 0 18px; padding: 12px 16px; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px; }
article h3 { font-size: 14px; margin: 0 0 8px; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 12px; }
.row figure { margin: 0; font-size: 12px; max-width: 100%; }
.row img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; }
.row figcaption { margin: 0 0 4px; white-space: pre-line; }
.mark { padding: 10px 16px; border: 2px solid #d9480f; border-radius: 12px; margin: 0 0 22px; }
</style>"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Numbers of pictures to be shown under ``title``."""

    title: str
    numbers: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A picture and what tokenizers make of it, each below its own lines of ``facts``."""

    name: str
    original: Picture
    decoded: Mapping[str, Picture]
    facts: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Pictures of one sort at one resolution."""

    title: str
    pictures: Sequence[Shown]


def choose(found: Resolution, *, shown: int) -> list[Choice]:
    """The worst and the best pictures by PSNR, its mean over tokenizers, then the first ones of
    the rest; none twice."""
    scores: dict[int, float] = {}
    for each in found.tokenizers.values():
        for figures in each.pictures:
            scores[figures.number] = scores.get(figures.number, 0.0) + figures.psnr
    ranked = sorted(scores, key=lambda number: (scores[number], number))
    worst, rest = ranked[:shown], ranked[shown:]
    best = rest[max(0, len(rest) - shown) :][::-1]
    first = sorted(set(rest) - set(best))[:shown]
    return [
        Choice(title="Worst by PSNR", numbers=worst),
        Choice(title="Best by PSNR", numbers=best),
        Choice(title="First of the others", numbers=first),
    ]


def choose_texts(found: Resolution, *, shown: int) -> list[int]:
    """The pictures whose text was read worst, by edit distance over all tokenizers and lines."""
    distances: dict[int, list[float]] = {}
    for each in found.tokenizers.values():
        for line in each.lines:
            distances.setdefault(line.picture, []).append(line.distance)
    means = {number: sum(values) / len(values) for number, values in distances.items()}
    return sorted(means, key=lambda number: (-means[number], number))[:shown]


def picture_facts(found: Resolution, *, number: int) -> dict[str, str]:
    """Figures of picture ``number`` by tokenizer, a line each."""
    facts: dict[str, str] = {}
    for name, each in found.tokenizers.items():
        figures = next(item for item in each.pictures if item.number == number)
        lines = [f"PSNR {figures.psnr:.2f} dB, SSIM {figures.ssim:.4f}"]
        if figures.lpips is not None:
            lines.append(f"LPIPS {figures.lpips:.4f}")
        if figures.faces:
            lines.append(f"faces {', '.join(f'{cosine:.3f}' for cosine in figures.faces)}")
        facts[name] = "\n".join(lines)
    return facts


def text_facts(found: Resolution, *, number: int) -> dict[str, str]:
    """What was to be read off picture ``number`` and what was, by tokenizer."""
    return {
        name: "\n".join(
            f"{line.wanted} \N{RIGHTWARDS ARROW} {line.read or '(nothing)'}"
            for line in each.lines
            if line.picture == number
        )
        for name, each in found.tokenizers.items()
    }


def page(evaluation: Evaluation, *, sections: Sequence[Section]) -> str:
    """The whole page as ASCII text."""
    tables = "".join(_table(evaluation, each=each) for each in evaluation.resolutions)
    said = "".join(f"<p>{words(note)}</p>" for note in notes(evaluation))
    rejected = _rejected(evaluation.rejected)
    body = "".join(_section(section) for section in sections)
    return ascii_page(
        chart_page(
            "",
            title=f"Image tokenizers: {', '.join(evaluation.tokenizers)}",
            lead=lead(evaluation),
            above=f"{_STYLE}{rejected}{tables}{said}",
            below=body,
        )
    )


def _table(evaluation: Evaluation, *, each: Summaries) -> str:
    labels = {row.title: row.label for row in evaluation.rows}
    head = "".join(f"<th>{words(name)}</th>" for name in table_head(each))
    body = "".join(
        f'<tr title="{words(labels[cells[0]])}">'
        f"{''.join(f'<td>{words(cell)}</td>' for cell in (*cells, note))}</tr>"
        for cells, note in table_lines(evaluation, each=each)
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _rejected(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return ""
    named = "<br>".join(words(f"{name}: {reason}", most=300) for name, reason in reasons.items())
    return f'<div class="mark">Not used:<br>{named}</div>'


def _section(section: Section) -> str:
    if not section.pictures:
        return ""
    articles = "".join(_article(shown) for shown in section.pictures)
    return f"<h2>{words(section.title)}</h2>{articles}"


def _article(shown: Shown) -> str:
    figures = [_figure("original", picture=shown.original, facts="")]
    figures += [
        _figure(name, picture=picture, facts=shown.facts[name])
        for name, picture in shown.decoded.items()
    ]
    return (
        f'<article><h3>{words(shown.name)}</h3><div class="row">{"".join(figures)}</div></article>'
    )


def _figure(name: str, *, picture: Picture, facts: str) -> str:
    tag = picture_tag(_middle(picture), side=SIDE, alt=name)
    return (
        f"<figure><figcaption><b>{words(name)}</b></figcaption>{tag}"
        f'<figcaption class="facts">{words(facts)}</figcaption></figure>'
    )


def _middle(picture: Picture) -> Picture:
    height, width = picture.shape[:2]
    top, left = max(0, height - MOST) // 2, max(0, width - MOST) // 2
    return picture[top : top + MOST, left : left + MOST]
