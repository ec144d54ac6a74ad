"""``emu35 data stats|inspect|validate``: looking at token shards, and at what a run took."""

import argparse
from pathlib import Path

from emu35.errors import ConfigError
from emu35.run.arguments import Commands


def add(actions: "Commands[argparse.ArgumentParser]") -> None:
    """Describe the subcommands."""
    _add_stats(actions)
    _add_inspect(actions)
    _add_validate(actions)


def _add_stats(actions: "Commands[argparse.ArgumentParser]") -> None:
    text = "documents, pictures, tokens, lengths, modalities, grids and packing fill of sources"
    command = actions.add_parser("stats", help=text, description=text)
    command.add_argument("folders", nargs="+", metavar="DIR", help="folder or URL")
    command.add_argument(
        "--sequence-length", type=int, default=32768, metavar="N", help="row to pack for"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    command.add_argument("--html", type=Path, metavar="FILE", help="also write a page with plots")
    command.set_defaults(handler=_stats)


def _add_inspect(actions: "Commands[argparse.ArgumentParser]") -> None:
    text = "print documents of a source, or those that a step of a run was trained on"
    command = actions.add_parser(
        "inspect",
        help=text,
        description=text + ". With --html also a page with their pictures in it, with --images "
        "their pictures as files.",
    )
    command.add_argument("folder", nargs="?", metavar="DIR", help="folder of shards, or its URL")
    command.add_argument(
        "--first", type=int, metavar="N", help="number of the first document (default 0)"
    )
    command.add_argument("--count", type=int, metavar="N", help="how many documents (default 5)")
    command.add_argument(
        "--random", type=int, metavar="SEED", help="documents drawn at random, the same for a seed"
    )
    command.add_argument("--run", type=Path, metavar="DIR", help="run folder, instead of shards")
    command.add_argument("--step", type=int, metavar="N", help="step of the run, counted from 1")
    command.add_argument(
        "--sample",
        type=int,
        metavar="K",
        help="sample of the step, counted from 0 (default: all of them, in brief)",
    )
    command.add_argument(
        "--token", type=int, metavar="T", help="the token at this column of the sample"
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="page to write")
    command.add_argument("--images", type=Path, metavar="DIR", help="write pictures here")
    command.add_argument(
        "--vision", type=Path, metavar="DIR", help="image tokenizer, to decode pictures"
    )
    command.add_argument("--table", metavar="FILE", help="text table of the emu35 tokenizer")
    command.set_defaults(handler=_inspect)


def _add_validate(actions: "Commands[argparse.ArgumentParser]") -> None:
    text = "read shards whole and name everything that is wrong with them"
    command = actions.add_parser(
        "validate",
        help=text,
        description=text + ". The exit code is 2 if anything is.",
    )
    command.add_argument("folders", nargs="+", metavar="DIR")
    command.add_argument(
        "--report", type=Path, metavar="FILE.jsonl", help="write every problem here, one a line"
    )
    command.add_argument(
        "--threads", type=int, default=2, metavar="N", help="shards read at a time (default 2)"
    )
    command.add_argument("--table", metavar="FILE", help="text table of the emu35 tokenizer")
    command.set_defaults(handler=_validate)


def _stats(arguments: argparse.Namespace) -> int:
    from emu35.stages.data_stats import StatsOptions, stats

    stats(
        StatsOptions(
            folders=arguments.folders,
            sequence_length=arguments.sequence_length,
            json=arguments.json,
            html=arguments.html,
        )
    )
    return 0


_OF_FOLDERS = ("first", "count", "random", "images")
_OF_RUNS = ("step", "sample", "token")


def _inspect(arguments: argparse.Namespace) -> int:
    if (arguments.folder is None) == (arguments.run is None):
        raise ConfigError("name a folder of shards to look at, or a run folder with --run")
    of_run = arguments.run is not None
    misplaced = [
        f"--{name}"
        for name in (_OF_FOLDERS if of_run else _OF_RUNS)
        if getattr(arguments, name) is not None
    ]
    if misplaced:
        raise ConfigError(
            f"{', '.join(misplaced)}: for {'a folder of shards' if of_run else 'a --run'} only"
        )
    return _trace(arguments) if of_run else _inspect_folder(arguments)


def _inspect_folder(arguments: argparse.Namespace) -> int:
    from emu35.stages.data_inspect import InspectOptions, inspect

    options = InspectOptions(
        folder=arguments.folder,
        first=arguments.first,
        random=arguments.random,
        images=arguments.images,
        vision=arguments.vision,
        html=arguments.html,
        table=arguments.table,
    )
    if arguments.count is not None:
        options.count = arguments.count
    inspect(options)
    return 0


def _trace(arguments: argparse.Namespace) -> int:
    from emu35.stages.data_trace import TraceOptions, trace

    if arguments.step is None:
        raise ConfigError("--run needs --step, the step whose documents are wanted")
    trace(
        TraceOptions(
            run=arguments.run,
            step=arguments.step,
            sample=arguments.sample,
            token=arguments.token,
            html=arguments.html,
            vision=arguments.vision,
            table=arguments.table,
        )
    )
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from emu35.stages.data_validate import ValidateOptions, validate

    validate(
        ValidateOptions(
            folders=arguments.folders,
            report=arguments.report,
            threads=arguments.threads,
            table=arguments.table,
        )
    )
    return 0
