"""``emu35 data stats``: what folders of shards hold, on the terminal, as JSON and as a page."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emu35.data.ingest.progress import Progress
from emu35.data.place import name_of, place_of
from emu35.data.source import Source
from emu35.data.stats import (
    Counts,
    SourceStats,
    count_source,
    documents_with_pictures,
    packing_fill,
    source_of,
    stats_of,
    together,
)
from emu35.errors import ConfigError
from emu35.log.charts import Bar, bar_chart, chart_page
from emu35.log.console import human_count
from emu35.stages.data import file_errors
from emu35.stages.inline import ascii_page, words
from emu35.stages.output import write_output

_BAR = 40
_LISTED_GRIDS = 8
_SLOW = 100_000
"""Documents from which on looking for grids shows its progress."""

TOGETHER = "all"

_STYLE = """<style>
table { border-collapse: collapse; margin: 0 0 18px; font-size: 13px; display: block;
  overflow-x: auto; }
th, td { padding: 4px 8px; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
h2 { font-size: 18px; }
</style>"""


@dataclass(kw_only=True, slots=True)
class StatsOptions:
    """``sequence_length`` is the row that packing is measured for. ``json`` prints one JSON object
    instead of words; ``html`` is a page to write beside what is printed."""

    folders: Sequence[str | Path]
    sequence_length: int = 32768
    json: bool = False
    html: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderStats:
    """Each folder by itself, and where there are several, all of them ``together``."""

    sequence_length: int
    sources: list[SourceStats]
    together: SourceStats

    @property
    def several(self) -> bool:
        return len(self.sources) > 1


@file_errors()
def stats(options: StatsOptions) -> FolderStats:
    """Print documents, pictures, tokens, lengths, modalities, grids and packing fill.

    Raises:
        ConfigError: the row is shorter than a token.
        DataError: if a folder cannot be used, or the page cannot be written.
    """
    if options.sequence_length < 1:
        raise ConfigError(f"--sequence-length {options.sequence_length} must be at least 1")
    found = _measure(options)
    if options.json:
        print(json.dumps(_to_json(found), indent=1))
    else:
        print("\n".join(_lines(found)))
    if options.html is not None:
        write_output(options.html, content=ascii_page(page_of(found)).encode("ascii"))
        if not options.json:
            print(f"written: {options.html}")
    return found


def _measure(options: StatsOptions) -> FolderStats:
    folders = list(dict.fromkeys(map(place_of, options.folders)))
    last = list(map(name_of, folders))
    # Two folders of one name are told apart by where they lie.
    names = [
        str(folder) if last.count(name) > 1 else name
        for folder, name in zip(folders, last, strict=True)
    ]
    opened = [source_of(path, name=name) for path, name in zip(folders, names, strict=True)]
    counts = _count(opened)
    return FolderStats(
        sequence_length=options.sequence_length,
        sources=[
            stats_of(
                counted,
                name=source.name,
                fill=packing_fill(source, sequence_length=options.sequence_length),
            )
            for source, counted in zip(opened, counts, strict=True)
        ],
        together=stats_of(together(counts), name=TOGETHER),
    )


def _count(sources: Sequence[Source]) -> list[Counts]:
    sizes = [len(documents_with_pictures(source)) for source in sources]
    if sum(sizes) <= _SLOW:
        return [count_source(source, watch=lambda done: None) for source in sources]
    progress = Progress(label="grids", total=sum(sizes), items="documents")
    counts: list[Counts] = []
    with contextlib.closing(progress):
        for source, size in zip(sources, sizes, strict=True):
            progress.begin(size=size)
            counts.append(
                count_source(source, watch=lambda done: progress.update(done, items=done))
            )
    return counts


# ---------------------------------------------------------------------------- words


def _lines(found: FolderStats) -> list[str]:
    lines: list[str] = []
    for stats in found.sources:
        lines += [*_source_lines(stats), ""]
    if not found.several:
        return lines[:-1]
    return [
        *lines,
        *_source_lines(found.together),
        "",
        *_aligned([HEAD, *table(found)]),
    ]


def _source_lines(stats: SourceStats) -> list[str]:
    lengths = "  ".join(f"p{rank} {value}" for rank, value in stats.percentiles.items())
    shares = "  ".join(
        f"{name} {count / stats.tokens:.1%}" for name, count in stats.modality.items()
    )
    lines = [
        f"{stats.name}: {stats.documents} documents, {stats.tokens} tokens, {stats.shards} shards, "
        f"{stats.pictures} pictures",
        f"  length   {lengths}  max {stats.longest}",
        f"  tokens   {shares}",
    ]
    if stats.fill is not None:
        lines.append(f"  packing  {_fill(stats)}")
    if stats.grids:
        lines.append(f"  grids    {_grids(stats)}")
    lines += [f"  codes    of image tokenizer {encoder}" for encoder in stats.encoders]
    return lines + _bars(stats)


def _fill(stats: SourceStats) -> str:
    fill = stats.fill
    assert fill is not None
    if fill.share is None:
        return f"not into rows of {fill.length}: {fill.problem}"
    return f"{fill.share:.2%} of rows of {fill.length}"


def _grids(stats: SourceStats) -> str:
    shown = "  ".join(
        f"{rows}x{columns} {number} ({number / stats.pictures:.1%})"
        for rows, columns, number in stats.grids[:_LISTED_GRIDS]
    )
    more = len(stats.grids) - _LISTED_GRIDS
    return shown + (f"  and {more} more sizes" if more > 0 else "")


def _bars(stats: SourceStats) -> list[str]:
    """The histogram of lengths, a line a bin, bars by documents."""
    highest = max(bin.documents for bin in stats.histogram)
    rows = [
        [
            f"{bin.low}..{bin.high - 1}",
            str(bin.documents),
            f"{bin.tokens / stats.tokens:.1%}",
            # A bin with a single document among millions still shows.
            "#" * max(bin.documents > 0, round(_BAR * bin.documents / highest)),
        ]
        for bin in stats.histogram
    ]
    return [f"  {line}" for line in _aligned([["length", "documents", "of tokens", ""], *rows])]


HEAD = [
    *("source", "shards", "documents", "pictures", "tokens", "share"),
    *("text", "visual", "layout", "control", "p50", "max", "fill"),
]


def table(found: FolderStats) -> list[list[str]]:
    """A line a source below :data:`HEAD`, and where there are several, one for all of them."""
    lines = [*found.sources, *([found.together] if found.several else [])]
    return [_cells(stats, of=found.together.tokens) for stats in lines]


def _cells(stats: SourceStats, *, of: int) -> list[str]:
    fill = "" if stats.fill is None else "none"
    if stats.fill is not None and stats.fill.share is not None:
        fill = f"{stats.fill.share:.2%}"
    return [
        stats.name,
        *(str(n) for n in (stats.shards, stats.documents, stats.pictures, stats.tokens)),
        f"{stats.tokens / of:.1%}",
        *(f"{count / stats.tokens:.1%}" for count in stats.modality.values()),
        str(stats.percentiles[50]),
        str(stats.longest),
        fill,
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side: the first and an unnamed last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if at == 0 or not rows[0][at] else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _to_json(found: FolderStats) -> dict[str, object]:
    return {
        "sequence_length": found.sequence_length,
        "sources": [stats.to_json() for stats in found.sources],
        "together": found.together.to_json(),
    }


# ---------------------------------------------------------------------------- page


def page_of(found: FolderStats) -> str:
    """The page: a table of all sources, then lengths and grids of each."""
    everything = found.together
    head = "".join(f"<th>{words(name)}</th>" for name in HEAD)
    body = "".join(_row(cells) for cells in table(found))
    shown = [*([everything] if found.several else []), *found.sources]
    problems = "".join(
        f"<p>{words(stats.name)}: {words(_fill(stats))}</p>"
        for stats in found.sources
        if stats.fill is not None and stats.fill.share is None
    )
    lead = (
        f"{everything.documents:,} documents, {everything.pictures:,} pictures, "
        f"{everything.tokens:,} tokens in {everything.shards:,} shards. share: of all tokens; "
        f"text to control: tokens by modality; fill: of packed rows of {found.sequence_length:,}."
    )
    return chart_page(
        "".join(_chart(stats) for stats in shown),
        title=", ".join(stats.name for stats in found.sources),
        lead=lead,
        above=f"{_STYLE}<table><tr>{head}</tr>{body}</table>{problems}",
        below="".join(_grid_table(stats) for stats in shown if stats.grids),
    )


def _row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{words(cell)}</td>' for cell in cells)}</tr>"


def _chart(stats: SourceStats) -> str:
    bars = [
        Bar(
            name=human_count(bin.low),
            value=bin.documents,
            said=f"{bin.low} to {bin.high - 1} tokens: {bin.documents} documents, "
            f"{bin.tokens / stats.tokens:.1%} of tokens",
        )
        for bin in stats.histogram
    ]
    return bar_chart(bars, x_label="tokens from", title=f"Documents by length: {stats.name}")


def _grid_table(stats: SourceStats) -> str:
    head = _row(["rows x columns", "pictures", "share"]).replace("td>", "th>")
    body = "".join(
        _row([f"{rows} x {columns}", f"{number}", f"{number / stats.pictures:.1%}"])
        for rows, columns, number in stats.grids
    )
    return f"<h2>Grids of pictures: {words(stats.name)}</h2><table>{head}{body}</table>"
