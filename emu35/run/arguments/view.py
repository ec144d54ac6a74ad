"""``emu35 view``: one HTML page of answers."""

import argparse
from pathlib import Path

from emu35.run.arguments import Commands


def add(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    text = "one HTML page of answers, with their pictures in it"
    command = commands.add_parser(
        "view",
        help=text,
        description=text + ". What cannot be shown is named on the page and on stderr; the exit "
        "code is 2 only where nothing can.",
    )
    command.add_argument(
        "source",
        type=Path,
        metavar="FILE.pb|DIR",
        help="a story, or a folder: of stories, of emu35 generate, or of the official viewer",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="PAGE.html",
        help="page to write (default: FILE.html, or DIR/view.html)",
    )
    command.add_argument(
        "--layout", type=Path, metavar="DIR", help="also write a folder as the official viewer does"
    )
    command.set_defaults(handler=_view)


def _view(arguments: argparse.Namespace) -> int:
    from emu35.stages.view.stage import ViewOptions, view

    options = ViewOptions(source=arguments.source, out=arguments.out, layout=arguments.layout)
    report = view(options)
    print(f"{options.page}: {report.counts}")
    return 0
