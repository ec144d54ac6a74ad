"""``emu35 data filter-prompts``: prompts that are neither too hard nor too easy for a model."""

import argparse
from pathlib import Path

from emu35.run.arguments import Commands
from emu35.run.arguments.generate import RECORDS, add_asked, read_asked
from emu35.run.arguments.source import add_source, end_without_leading


def add(actions: "Commands[argparse.ArgumentParser]") -> None:
    """Describe the action."""
    text = "keep the prompts that a model answers well now and then, neither never nor always"
    command = actions.add_parser(
        "filter-prompts",
        help=text,
        description=text + ", for stage=grpo. Every prompt is answered a few times and judged by a "
        "reward; kept.jsonl has the prompts whose pass rate lies in the range, rates.jsonl those "
        "of all. Run again, it goes on where it was stopped; with other thresholds it samples "
        "nothing again.",
        epilog=RECORDS,
    )
    command.add_argument(
        "prompts_file", type=Path, metavar="PROMPTS.jsonl", help="a record a line, see below"
    )
    add_source(command)
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="kept.jsonl and rates.jsonl go here"
    )
    command.add_argument(
        "--replace", action="store_true", help="start over instead of going on with DIR"
    )
    _add_kept(command)
    add_asked(command)
    command.set_defaults(handler=_filter)


def _add_kept(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what is kept")
    group.add_argument(
        "--samples", type=int, default=8, metavar="N", help="answers to every prompt (default 8)"
    )
    group.add_argument(
        "--reward",
        required=True,
        metavar="NAME",
        help="a kind of reward that needs nothing configured, such as scene or ocr, or a function "
        "of (record, pictures) as package.module:function",
    )
    group.add_argument(
        "--pass-at",
        type=float,
        required=True,
        metavar="X",
        help="an answer passes with a reward of at least X",
    )
    group.add_argument(
        "--low",
        type=float,
        default=0.1,
        metavar="RATE",
        help="lowest pass rate that is kept (default 0.1)",
    )
    group.add_argument(
        "--high",
        type=float,
        default=0.9,
        metavar="RATE",
        help="highest pass rate that is kept (default 0.9)",
    )
    group.add_argument(
        "--prompts-per-commit",
        type=int,
        default=64,
        metavar="N",
        help="prompts that are committed together (default 64): an interruption loses those in "
        "flight",
    )


def _filter(arguments: argparse.Namespace) -> int:
    if (code := end_without_leading(arguments)) is not None:
        return code
    from emu35.data.ingest.options import Existing
    from emu35.stages.distill.rates import FilterOptions, filter_prompts

    filter_prompts(
        FilterOptions(
            ask=read_asked(arguments),
            reward=arguments.reward,
            pass_at=arguments.pass_at,
            samples=arguments.samples,
            low=arguments.low,
            high=arguments.high,
            prompts_per_commit=arguments.prompts_per_commit,
            existing=Existing.replace if arguments.replace else Existing.resume,
        )
    )
    return 0
