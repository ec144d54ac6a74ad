"""What ``emu35 generate`` and ``emu35 serve`` load, and over how many ranks."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emu35.config import Precision
    from emu35.model.quantize import Quantization
    from emu35.tokens.template import PromptTemplate

QUANTIZATIONS = ("int8_weights", "fp8_weights", "fp8_dynamic")
TEMPLATES = ("auto", "official", "plain")
PRECISIONS = ("fp32", "bf16")


def add_source(command: argparse.ArgumentParser) -> None:
    """Describe the options."""
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, dest="source", metavar="DIR", help="run folder")
    source.add_argument("--release", type=Path, dest="source", metavar="DIR")
    command.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    command.add_argument(
        "--vision", type=Path, metavar="DIR", help="image tokenizer, if the source names none"
    )
    command.add_argument(
        "--template",
        choices=TEMPLATES,
        default="auto",
        help="form of the prompt (default auto: the one that the model was trained for)",
    )
    command.add_argument("--precision", choices=PRECISIONS, help="default: as trained")
    command.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="eight bits for the layers' weights, with fp8_dynamic for activations as well (a GPU "
        "that multiplies in FP8); extra quantize",
    )
    command.add_argument(
        "--tp", type=int, default=1, metavar="N", help="split the model over N ranks of this host"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The options that need more than their words."""

    template: "PromptTemplate | None"
    precision: "Precision | None"
    quantize: "Quantization | None"


def read_source(arguments: argparse.Namespace) -> Chosen:
    """The template, precision and quantisation; None stands for what the model was trained with."""
    from emu35.config import Precision
    from emu35.model.quantize import Quantization
    from emu35.tokens.template import PromptTemplate

    template: str = arguments.template
    return Chosen(
        template=None if template == "auto" else PromptTemplate(template),
        precision=Precision(arguments.precision) if arguments.precision else None,
        quantize=Quantization(arguments.quantize) if arguments.quantize else None,
    )


def end_without_leading(arguments: argparse.Namespace) -> int | None:
    """See to it that the command runs in ``--tp`` ranks. None on rank 0, which is to go on with it;
    elsewhere the exit code, when all is over.

    Raises:
        Emu35Error: the ranks cannot be started, or the source cannot be opened.
    """
    from emu35.run.tp import in_ranks

    if (code := in_ranks(arguments.tp)) is not None:
        return code
    from emu35.inference.lead import follow, follows

    if not follows():
        return None
    chosen = read_source(arguments)
    follow(
        arguments.source,
        step=arguments.step,
        precision=chosen.precision,
        tp=arguments.tp,
        quantize=chosen.quantize,
    )
    return 0
