"""``emu35 dida fit-path``: what discrete diffusion adaptation needs to know before a run."""

import argparse
from pathlib import Path

from emu35.run.arguments import Commands


def add(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    text = "prepare discrete diffusion adaptation"
    actions = commands.add_parser("dida", help=text, description=text).add_subparsers(
        required=True, metavar="ACTION"
    )
    text = "fit c and alpha of the metric path to an image tokenizer, and plot the path"
    command = actions.add_parser(
        "fit-path",
        help=text,
        description=text + ". Prints what to paste into a configuration; DIR gets path.json and "
        "path.html.",
    )
    command.add_argument(
        "--vision", type=Path, required=True, metavar="FOLDER", help="image tokenizer"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    command.add_argument(
        "--shards",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="weigh codes by how often they occur in these token shards (default: all alike)",
    )
    command.add_argument(
        "--codes",
        type=int,
        default=256,
        metavar="N",
        help="original codes that means are taken over (default 256)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="which ones (default 0)")
    command.add_argument("--force", action="store_true", help="write over what DIR holds")
    command.set_defaults(handler=_fit_path)


def _fit_path(arguments: argparse.Namespace) -> int:
    from emu35.stages.dida_path import FitPathOptions, fit_path_numbers

    fit_path_numbers(
        FitPathOptions(
            vision=arguments.vision.expanduser(),
            out=arguments.out.expanduser(),
            shards=arguments.shards,
            codes=arguments.codes,
            seed=arguments.seed,
            force=arguments.force,
        )
    )
    return 0
