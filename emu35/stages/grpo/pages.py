"""Groups of answers as a person looks at them: an HTML page and a PNG beside it.

    samples/step_00000010.html      prompts, references, answers with every score and advantage
            step_00000010.png       the pictures alone, a row a group

Rewards are exploited in ways that no curve shows and one look does. Answers stand from the best
paid to the worst, so that the eye meets what is being learned.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from emu35.log.charts import chart_page
from emu35.rewards.sample import Picture
from emu35.stages.grpo.types import Group, Scores
from emu35.stages.inline import ascii_page, enlargement, picture_tag, png_bytes, words
from emu35.stages.output import unwritable, write_output

SAMPLES = "samples"
"""Folder of the pages inside a run folder."""

SIDE = 128
"""Pixels that small pictures are enlarged to, in whole multiples."""

_GAP, _LABEL = 8, 16
_MOST_TEXT = 2000

_STYLE = """<style>
.group { margin: 0 0 28px; padding: 14px 16px; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px; }
.group h2 { font-size: 16px; margin: 0 0 4px; white-space: pre-wrap; }
.group .facts { color: var(--soft); font-size: 13px; margin: 0 0 10px; }
.answers { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
.answer { max-width: 300px; font-size: 13px; }
.answer img, .references img { max-width: 100%; image-rendering: pixelated; display: block; }
.answer p { color: var(--ink); white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0; }
.references { display: flex; flex-wrap: wrap; gap: 8px; margin: 0 0 10px; }
.total { font-weight: 600; } .bad { color: #d9480f; }
td, th { padding: 1px 8px 1px 0; text-align: right; font-size: 12px; font-weight: 400; }
td:first-child, th:first-child { text-align: left; }
</style>"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownAnswer:
    """What an answer came to: its ``texts``, one more than ``pictures`` as in
    :class:`~emu35.rewards.sample.Sample`, and its ``advantage``, None where it was not trained
    on."""

    texts: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    advantage: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownGroup:
    """A group with what its tokens decode to: the ``prompt`` in words, pictures it shows, and its
    answers in the group's order."""

    group: Group
    prompt: str
    answers: Sequence[ShownAnswer]
    references: Sequence[Picture] = ()

    def ranked(self) -> list[tuple[ShownAnswer, Scores]]:
        """Answers and their scores, the best first, those without a total last."""
        pairs = list(zip(self.answers, self.group.scores, strict=True))
        return sorted(pairs, key=lambda pair: -_total(pair[1]))


def _total(scores: Scores) -> float:
    return -math.inf if scores.total is None else scores.total


def write_pages(groups: Sequence[ShownGroup], *, folder: Path, step: int, title: str) -> list[Path]:
    """Write the page of ``step`` into ``folder``, and its pictures, if any, as one PNG.

    Returns:
        the files.

    Raises:
        DataError: they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    stem = folder / f"step_{step:08d}"
    page = stem.with_suffix(".html")
    write_output(page, content=page_of(groups, title=f"{title}, step {step}").encode("ascii"))
    sheet = sheet_of(groups)
    if sheet is None:
        return [page]
    picture = stem.with_suffix(".png")
    write_output(picture, content=png_bytes(sheet))
    return [page, picture]


# ---------------------------------------------------------------------------- HTML


def page_of(groups: Sequence[ShownGroup], *, title: str) -> str:
    """The page as ASCII text, pictures and all; whatever a model wrote is shown, never obeyed."""
    lead = (
        f"{len(groups)} groups; answers from the best paid to the worst. Scores are in the "
        "reward's own range and, behind the arrow, in [1, 10]. A dash: not trained on."
    )
    below = "".join(map(_group, groups))
    return ascii_page(chart_page("", title=title, lead=lead, above=_STYLE, below=below))


def _group(shown: ShownGroup) -> str:
    prompt = shown.group.prompt
    totals = [scores.total for scores in shown.group.scores if scores.total is not None]
    facts = [f"task {prompt.task}", f"prompt {prompt.number} ({prompt.id})"]
    if totals:
        facts.append(f"mean {np.mean(totals):.2f}, {min(totals):.2f} to {max(totals):.2f}")
    references = "".join(map(_img, shown.references))
    answers = "".join(_answer(answer, scores) for answer, scores in shown.ranked())
    return (
        f'<div class="group"><h2>{_words(shown.prompt)}</h2>'
        f'<div class="facts">{_words("; ".join(facts))}</div>'
        + (f'<div class="references">{references}</div>' if references else "")
        + f'<div class="answers">{answers}</div></div>'
    )


def _answer(answer: ShownAnswer, scores: Scores) -> str:
    parts: list[str] = []
    for number in range(max(len(answer.texts), len(answer.pictures))):
        if number < len(answer.texts) and answer.texts[number].strip():
            parts.append(f"<p>{_words(answer.texts[number])}</p>")
        if number < len(answer.pictures):
            parts.append(_img(answer.pictures[number]))
    advantage = "-" if answer.advantage is None else f"{answer.advantage:+.3f}"
    total = "unscored" if scores.total is None else f"{scores.total:.2f}"
    rows = "".join(_component(name, scores) for name in {**scores.raw, **scores.unscored})
    return (
        f'<div class="answer">{"".join(parts)}'
        f'<div class="total">{total}, advantage {advantage}</div><table>{rows}</table></div>'
    )


def _component(name: str, scores: Scores) -> str:
    if name in scores.unscored:
        said = f'<td colspan="2" class="bad">{_words(scores.unscored[name])}</td>'
    else:
        mapped = f"&rarr; {scores.mapped[name]:.2f}" if name in scores.mapped else ""
        clamped = ' <span class="bad">clamped</span>' if name in scores.clamped else ""
        said = f"<td>{scores.raw[name]:.4g}</td><td>{mapped}{clamped}</td>"
    return f"<tr><th>{_words(name)}</th>{said}</tr>"


def _words(text: str) -> str:
    return words(text, most=_MOST_TEXT)


def _img(picture: Picture) -> str:
    return picture_tag(picture, side=SIDE)


# ---------------------------------------------------------------------------- PNG


def sheet_of(groups: Sequence[ShownGroup]) -> Image.Image | None:
    """A row a group: the pictures of its prompt, then those of its answers, the best first, each
    answer under its total. None where no group has a picture."""
    rows = [row for row in map(_row, groups) if row]
    if not rows:
        return None
    heights = [max(cell.height for _, cell in row) + _LABEL for row in rows]
    width = max(sum(cell.width + _GAP for _, cell in row) for row in rows) + _GAP
    sheet = Image.new("RGB", (width, sum(heights) + _GAP * (len(rows) + 1)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        left = _GAP
        for label, cell in row:
            draw.text((left, top), label, fill=(60, 60, 60))
            sheet.paste(cell, (left, top + _LABEL))
            left += cell.width + _GAP
        top += height + _GAP
    return sheet


def _row(shown: ShownGroup) -> list[tuple[str, Image.Image]]:
    """Labels and pictures; the further pictures of an answer carry no label."""
    cells = [("asked", _enlarged(picture)) for picture in shown.references]
    for answer, scores in shown.ranked():
        total = "unscored" if scores.total is None else f"{scores.total:.2f}"
        labels = [total, *[""] * len(answer.pictures)]
        cells += [
            (label, _enlarged(picture))
            for label, picture in zip(labels, answer.pictures, strict=False)
        ]
    return cells


def _enlarged(picture: Picture) -> Image.Image:
    """Small pictures by whole factors, so that their pixels stay theirs; large ones at most four
    times as large as ``SIDE``."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    factor = enlargement(picture, side=SIDE)
    if factor > 1:
        size = (image.width * factor, image.height * factor)
        return image.resize(size, Image.Resampling.NEAREST)
    image.thumbnail((4 * SIDE, 4 * SIDE))
    return image
