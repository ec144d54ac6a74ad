"""What an evaluation hands to people and programs: one table a resolution, and every number."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emu35.config.tokenizer_eval import ORIGINALS
from emu35.stages.tokenizer_eval.rows import TOKBENCH, Better, Row, rows_of
from emu35.stages.tokenizer_eval.summary import Summaries
from emu35.vision.fidelity import PSNR_CAP


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFacts:
    """What is known of a tokenizer before it is used."""

    folder: str
    weights_sha256: str
    factor: int
    codebook_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Everything that was measured. ``rejected`` are damaged files by name with a reason each,
    ``found`` pictures there were, ``versions`` those of packages, ``settings`` the measures'."""

    tokenizers: Mapping[str, TokenizerFacts]
    resolutions: Sequence[Summaries]
    found: int
    rejected: Mapping[str, str]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    bounds: Sequence[float]

    @property
    def rows(self) -> list[Row]:
        return list(rows_of(self.settings, bounds=self.bounds))

    def to_json(self) -> dict[str, Any]:
        """Every number, JSON-ready."""
        return {
            "tokenizers": {
                name: {
                    "folder": facts.folder,
                    "weights_sha256": facts.weights_sha256,
                    "factor": facts.factor,
                    "codebook_size": facts.codebook_size,
                }
                for name, facts in self.tokenizers.items()
            },
            "pictures": {"found": self.found, "rejected": dict(self.rejected)},
            "resolutions": {
                str(each.side): {
                    "pictures": each.pictures,
                    "enlarged": each.enlarged,
                    "tokenizers": {
                        name: summary.to_json() for name, summary in each.tokenizers.items()
                    },
                    ORIGINALS: each.originals.to_json(),
                    "not_measured": dict(each.missing),
                }
                for each in self.resolutions
            },
            "labels": {
                row.key: {"title": row.title, "better": row.better.value, "what": row.label}
                for row in self.rows
            },
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }


ARROWS = {Better.higher: "higher is better", Better.lower: "lower is better", Better.neither: ""}


def table_head(each: Summaries) -> list[str]:
    """Of the table of a resolution."""
    return [f"{each.side} x {each.side} pixels", *each.tokenizers, ORIGINALS, ""]


def table_lines(evaluation: Evaluation, *, each: Summaries) -> Iterator[tuple[list[str], str]]:
    """Cells below :func:`table_head`, without the last one; and why they are empty, or which way is
    better. Heights that no line has are left out where other heights have some."""
    for row in evaluation.rows:
        reason = each.missing.get(row.key)
        if reason and _is_unused(row.key, each=each):
            continue
        cells = [
            _cell(summary.figures.get(row.key), form=row.form)
            for summary in (*each.tokenizers.values(), each.originals)
        ]
        yield [row.title, *cells], f"not measured: {reason}" if reason else ARROWS[row.better]


def _is_unused(key: str, *, each: Summaries) -> bool:
    """Whether ``key`` is a height that no line has, while there is text."""
    by_height = key.startswith("text_") and key not in ("text_accuracy", "text_edit_distance")
    return by_height and ("text_accuracy" in each.missing or bool(each.originals.counts["lines"]))


def _cell(value: float | None, *, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def lead(evaluation: Evaluation) -> str:
    """How many pictures, and what was wrong with some."""
    used = max((each.pictures for each in evaluation.resolutions), default=0)
    text = f"{used} of {evaluation.found} pictures"
    if evaluation.rejected:
        text += f"; not usable: {len(evaluation.rejected)} (named in results.json)"
    enlarged = {each.side: each.enlarged for each in evaluation.resolutions if each.enlarged}
    for side, count in enlarged.items():
        text += f"; {count} were smaller than {side} pixels and enlarged, which flatters"
    lines = max((each.originals.counts["lines"] for each in evaluation.resolutions), default=0)
    return f"{text}; {lines} lines of text."


def notes(evaluation: Evaluation) -> list[str]:
    """What the reader of the table should know."""
    found: list[str] = []
    exact = [
        f"{name} at {each.side} pixels: {summary.counts['psnr_capped']}"
        for each in evaluation.resolutions
        for name, summary in each.tokenizers.items()
        if summary.counts["psnr_capped"]
    ]
    if exact:
        found.append(
            f"Pictures with no error or next to none, whose PSNR counts as {PSNR_CAP:g} dB: "
            f"{'; '.join(exact)}."
        )
    if any(each.originals.counts["lines"] for each in evaluation.resolutions):
        found.append(
            f"Text and faces: {TOKBENCH}. The column of the originals is what the reader makes of "
            "the pictures before any tokenizer."
        )
    return found


def table_markdown(evaluation: Evaluation) -> str:
    """``table.md``."""
    lines = ["# Image tokenizers", "", lead(evaluation)]
    for each in evaluation.resolutions:
        head = table_head(each)
        lines += ["", f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 2)}---|"]
        lines += [
            f"| {' | '.join([*cells, note])} |"
            for cells, note in table_lines(evaluation, each=each)
        ]
    lines += [part for note in notes(evaluation) for part in ("", note)]
    return "\n".join(lines) + "\n"


def table_text(evaluation: Evaluation) -> str:
    """The same for a terminal, in columns."""
    parts = [lead(evaluation)]
    for each in evaluation.resolutions:
        rows = [(table_head(each)[:-1], "")]
        rows += table_lines(evaluation, each=each)
        widths = [max(len(cells[at]) for cells, _ in rows) for at in range(len(rows[0][0]))]
        parts.append("")
        for cells, note in rows:
            first, *rest = (
                cell.rjust(width) if at else cell.ljust(width)
                for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            parts.append("  ".join([first, *rest, note]).rstrip())
    parts += [part for note in notes(evaluation) for part in ("", note)]
    return "\n".join(parts) + "\n"
