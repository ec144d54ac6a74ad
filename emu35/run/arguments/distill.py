"""``emu35 data distill``: a model's own answers to prompts, as token shards."""

import argparse
from pathlib import Path

from emu35.run.arguments import Commands
from emu35.run.arguments.generate import RECORDS, add_asked, read_asked
from emu35.run.arguments.source import add_source, end_without_leading


def add(actions: "Commands[argparse.ArgumentParser]") -> None:
    """Describe the action."""
    text = "a model's own answers to prompts, filtered by a reward, to token shards"
    command = actions.add_parser(
        "distill",
        help=text,
        description=text + ", for stage=dida and stage=sft. Run again, it goes on where it was "
        "stopped. samples.jsonl beside the shards tells what became of every answer.",
        epilog=RECORDS,
    )
    command.add_argument(
        "prompts_file", type=Path, metavar="PROMPTS.jsonl", help="a record a line, see below"
    )
    add_source(command)
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="shards go here, of all parts"
    )
    command.add_argument(
        "--source", dest="name", metavar="NAME", help="name of the shards (default: DIR's)"
    )
    command.add_argument(
        "--part",
        metavar="I/N",
        default="1/1",
        help="answer the I-th of N parts of the prompts (counted from 1): one job for each, all "
        "into DIR",
    )
    command.add_argument(
        "--replace", action="store_true", help="start over instead of going on with DIR"
    )
    _add_kept(command)
    add_asked(command)
    command.set_defaults(handler=_distill)


def _add_kept(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what is kept")
    group.add_argument(
        "--samples", type=int, default=1, metavar="N", help="answers to every prompt (default 1)"
    )
    group.add_argument(
        "--reward",
        metavar="NAME",
        help="a kind of reward that needs nothing configured, such as scene (the share of a "
        "described scene's attributes that its picture shows), or a function of (record, pictures) "
        "as package.module:function; without one every whole answer is kept",
    )
    group.add_argument("--min-reward", type=float, metavar="X", help="keep answers of at least X")
    group.add_argument(
        "--keep-best", type=int, metavar="K", help="keep at most the K best answers of a prompt"
    )
    group.add_argument(
        "--sequence-length",
        type=int,
        default=0,
        metavar="N",
        help="drop documents that are longer in tokens (default 0: no limit)",
    )
    group.add_argument(
        "--prompts-per-shard",
        type=int,
        default=64,
        metavar="N",
        help="prompts that are committed together (default 64): an interruption loses those in "
        "flight",
    )
    group.add_argument("--shard-bytes", type=int, default=256 * 2**20, metavar="N")


def _distill(arguments: argparse.Namespace) -> int:
    if (code := end_without_leading(arguments)) is not None:
        return code
    from emu35.data.ingest.options import Existing
    from emu35.stages.distill.options import DistillOptions, parse_part
    from emu35.stages.distill.run import distill

    ask = read_asked(arguments)
    distill(
        DistillOptions(
            ask=ask,
            source=arguments.name or ask.out.absolute().name,
            samples=arguments.samples,
            reward=arguments.reward,
            min_reward=arguments.min_reward,
            keep_best=arguments.keep_best,
            sequence_length=arguments.sequence_length,
            prompts_per_shard=arguments.prompts_per_shard,
            shard_bytes=arguments.shard_bytes,
            part=parse_part(arguments.part),
            existing=Existing.replace if arguments.replace else Existing.resume,
        )
    )
    return 0
