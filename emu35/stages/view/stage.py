"""``emu35 view``: the page of a file or folder."""

import sys
from dataclasses import dataclass
from pathlib import Path

from emu35.errors import ConfigError
from emu35.log.console import Console
from emu35.stages.view.layout import write_layout
from emu35.stages.view.page import PageReport, write_page
from emu35.stages.view.sources import read_stories

_LARGE_PAGE = 100 << 20
"""Bytes above which browsers are slow to open a page."""

_LISTED_PROBLEMS = 20

_SUFFIXES = (".html", ".htm")


@dataclass(kw_only=True, slots=True)
class ViewOptions:
    """``source`` is a ``.pb`` file or a folder. ``out`` is the page (None: beside the file, or
    ``view.html`` in the folder). ``layout``: also write the official viewer's folder there, for a
    source of several stories one below it for each."""

    source: Path
    out: Path | None = None
    layout: Path | None = None

    @property
    def page(self) -> Path:
        """Where the page goes."""
        if self.out is not None:
            return self.out
        if self.source.is_dir():
            return self.source / "view.html"
        return self.source.with_name(f"{self.source.stem}.html")


def view(options: ViewOptions) -> PageReport:
    """Write the page, and name on stderr what could not be shown.

    Raises:
        ConfigError: options that make no sense, all of them named.
        DataError: not one story could be shown, or the page cannot be written.
        ReleaseError: the folder for the official layout is not empty.
    """
    check(options)
    console = Console(stream=sys.stderr)
    report = write_page(
        read_stories(options.source), options.page, title=options.source.absolute().name
    )
    if options.layout is not None:
        _write_layouts(options, folder=options.layout, several=report.stories > 1)
    for line in report.problems[:_LISTED_PROBLEMS]:
        console.line(line)
    if (more := len(report.problems) - _LISTED_PROBLEMS) > 0:
        console.line(f"... and {more} more problems, all of them named on the page")
    if report.bytes > _LARGE_PAGE:
        console.line(
            f"{options.page} has {report.bytes >> 20} MiB, which browsers are slow to open; view "
            "its stories one by one for smaller pages"
        )
    return report


def check(options: ViewOptions) -> None:
    """Raise ConfigError naming everything that is wrong with ``options``."""
    problems: list[str] = []
    if not options.source.exists():
        problems.append(f"{options.source} does not exist; name a .pb file, or a folder")
    page = options.page
    if options.out is not None and page.suffix.lower() not in _SUFFIXES:
        problems.append(f"--out {page} is no HTML file; its name must end in .html")
    elif page.is_dir():
        problems.append(f"--out {page} is a folder; name a file in it, such as {page}/view.html")
    elif page.exists() and options.source.exists() and page.samefile(options.source):
        problems.append(f"the page would replace {options.source} itself; choose another --out")
    if not page.absolute().parent.is_dir():
        problems.append(f"--out {page}: its folder does not exist; make it, or choose another")
    layout = options.layout
    if layout is not None and (layout.is_file() or (layout.is_dir() and any(layout.iterdir()))):
        problems.append(f"--layout {layout} is not empty; name a folder that does not exist yet")
    if problems:
        raise ConfigError(problems)


def _write_layouts(options: ViewOptions, *, folder: Path, several: bool) -> None:
    """What cannot be written is on the page already, so it is not reported again."""
    stories = (shown for shown in read_stories(options.source) if shown.story is not None)
    for number, shown in enumerate(stories):
        write_layout(shown, folder / f"{number:03d}" if several else folder)
