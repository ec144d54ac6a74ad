"""``emu35 data ingest|tokenize|distill|pack|...``: token shards and prompts, in and out."""

import argparse
from pathlib import Path

from emu35.run.arguments import (
    Commands,
    data_look,
    distill,
    filter_prompts,
    ingest,
    tokenize,
)

OVERLONG = ("cut", "drop", "refuse")
TASKS = ("chat", "t2i", "x2i", "story", "howto", "explore", "vla")


def add(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    text = "make token shards, and look at what is in them"
    actions = commands.add_parser("data", help=text, description=text).add_subparsers(
        required=True, metavar="ACTION"
    )
    ingest.add(actions)
    tokenize.add(actions)
    distill.add(actions)
    filter_prompts.add(actions)
    _add_tasks(actions)
    _add_pack(actions)
    _add_index(actions)
    data_look.add(actions)


def _add_tasks(actions: "Commands[argparse.ArgumentParser]") -> None:
    text = "how the records of fine-tuning tasks are written, one JSON object a line"
    command = actions.add_parser("tasks", help=text, description=text)
    command.add_argument("task", nargs="?", choices=TASKS, help="this one alone")
    command.set_defaults(handler=_tasks)


def _add_pack(actions: "Commands[argparse.ArgumentParser]") -> None:
    text = "pack the documents of shards into rows once, for stage 2 and fine-tuning"
    command = actions.add_parser(
        "pack",
        help=text,
        description=text + ". All documents of all inputs are packed together, best fit "
        "decreasing. Training reads what is written as it is, with data.sequence_length=N: name "
        "DIR as data.sources.NAME.path.",
    )
    command.add_argument("inputs", nargs="+", metavar="IN", help="folder of shards or URL")
    command.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="the packed shards; not there yet"
    )
    command.add_argument(
        "--sequence-length", type=int, metavar="N", required=True, help="tokens of a row"
    )
    command.add_argument("--source", metavar="NAME", help="name of the shards (default: DIR's)")
    command.add_argument(
        "--overlong",
        choices=OVERLONG,
        default="cut",
        help="what becomes of documents longer than a row: cut at parts (default), left out, or "
        "refused; fine-tuning does not learn from what is cut",
    )
    command.add_argument(
        "--seed", type=int, default=1234, metavar="N", help="of the order of the rows"
    )
    command.add_argument("--shard-bytes", type=int, default=256 * 2**20, metavar="N")
    command.set_defaults(handler=_pack)


def _add_index(actions: "Commands[argparse.ArgumentParser]") -> None:
    text = "rebuild the indices of shards, or check shards against them"
    command = actions.add_parser("index", help=text, description=text)
    command.add_argument("folders", nargs="+", metavar="DIR", help="folder or URL")
    command.add_argument("--verify", action="store_true", help="hash and compare, write nothing")
    command.set_defaults(handler=_index)


def _tasks(arguments: argparse.Namespace) -> int:
    from emu35.data.readers.task_table import describe_task, describe_tasks
    from emu35.tokens.template import Task

    task: str | None = arguments.task
    print("\n".join(describe_task(Task(task)) if task else describe_tasks()))
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from emu35.config.data import Overlong
    from emu35.data.packed import PackOptions
    from emu35.data.place import place_of
    from emu35.stages.data import pack

    out: Path = arguments.out
    pack(
        PackOptions(
            inputs=[place_of(given) for given in arguments.inputs],
            out=out,
            sequence_length=arguments.sequence_length,
            source=arguments.source or out.resolve().name,
            seed=arguments.seed,
            overlong=Overlong(arguments.overlong),
            shard_bytes=arguments.shard_bytes,
        )
    )
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from emu35.stages.data import IndexOptions, index

    index(IndexOptions(folders=arguments.folders, verify=arguments.verify))
    return 0
