"""``emu35 generate``: prompts to pictures and text, from a run or a release."""

import argparse
import json
from pathlib import Path
from typing import Any

from emu35.config.schema import is_mapping
from emu35.errors import DataError
from emu35.run.arguments import Commands

TASKS = ("t2i", "x2i", "howto", "story", "explore", "vla", "chat")
TEMPLATES = ("auto", "official", "plain")
PRECISIONS = ("fp32", "bf16")

_PROMPT_FORM = 'a line is {"prompt": "..."}'


def add(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    text = "pictures and text from prompts, by a run or a release"
    command = commands.add_parser("generate", help=text, description=text)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, dest="source", metavar="DIR", help="run folder")
    source.add_argument("--release", type=Path, dest="source", metavar="DIR")
    command.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    command.add_argument(
        "--vision", type=Path, metavar="DIR", help="image tokenizer, if the source names none"
    )
    command.add_argument("--task", choices=TASKS, default="t2i")
    command.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be repeated"
    )
    command.add_argument(
        "--prompts-file", type=Path, metavar="JSONL", help=f"more prompts; {_PROMPT_FORM}"
    )
    command.add_argument(
        "--image",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="reference image of every prompt; may be repeated",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--batch-size", type=int, default=16, help="prompts at a time")
    command.add_argument("--max-new-tokens", type=int, metavar="N")
    command.add_argument("--precision", choices=PRECISIONS, help="default: as trained")
    _add_form(command)
    _add_sampling(command)
    command.set_defaults(handler=_generate)


def _add_form(command: argparse.ArgumentParser) -> None:
    grid = command.add_mutually_exclusive_group()
    grid.add_argument("--size", metavar="HxW", help="grid of each image in codes, such as 64x48")
    grid.add_argument("--ratio", help="aspect ratio such as 16:9; auto: the model decides")
    command.add_argument(
        "--image-area", type=int, metavar="PIXELS", help="references are resized to this area"
    )
    command.add_argument(
        "--template",
        choices=TEMPLATES,
        default="auto",
        help="form of the prompt (default auto: the one that the model was trained for)",
    )


def _add_sampling(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("sampling", "default: what the task recommends")
    group.add_argument("--guidance", type=float, help="1: off, and half the work")
    # Without a prefix an option holds for images: that is what most calls generate.
    for prefix, what in (("", "images"), ("text-", "text")):
        group.add_argument(f"--{prefix}temperature", type=float, help=f"for {what}")
        group.add_argument(f"--{prefix}top-k", type=int, metavar="K", help=f"for {what}")
        group.add_argument(f"--{prefix}top-p", type=float, metavar="P", help=f"for {what}")


def _generate(arguments: argparse.Namespace) -> int:
    from emu35.config import Precision
    from emu35.stages.generate import GenerateOptions, SamplingOverride, generate, parse_size
    from emu35.tokens.template import PromptTemplate, Task

    template: str = arguments.template
    generate(
        GenerateOptions(
            source=arguments.source,
            prompts=[*arguments.prompt, *read_prompts(arguments.prompts_file)],
            out=arguments.out,
            task=Task(arguments.task),
            images=arguments.image,
            vision=arguments.vision,
            template=None if template == "auto" else PromptTemplate(template),
            step=arguments.step,
            precision=Precision(arguments.precision) if arguments.precision else None,
            seed=arguments.seed,
            size=parse_size(arguments.size) if arguments.size else None,
            ratio=arguments.ratio,
            image_area=arguments.image_area,
            guidance=arguments.guidance,
            text=SamplingOverride(
                temperature=arguments.text_temperature,
                top_k=arguments.text_top_k,
                top_p=arguments.text_top_p,
            ),
            visual=SamplingOverride(
                temperature=arguments.temperature,
                top_k=arguments.top_k,
                top_p=arguments.top_p,
            ),
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
        )
    )
    return 0


def read_prompts(file: Path | None) -> list[str]:
    """The prompts of a JSON lines file, in order; blank lines are left out.

    Raises:
        DataError: the file cannot be read, or a line is no prompt (its number is named).
    """
    if file is None:
        return []
    try:
        # Not splitlines(): U+2028 inside a prompt is no end of a line of JSON.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); give a UTF-8 file of prompts") from None
    prompts: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: {error}; {_PROMPT_FORM}") from None
        prompt = record.get("prompt") if is_mapping(record) else None
        if not isinstance(prompt, str):
            raise DataError(f"{file}, line {number}: no prompt in it; {_PROMPT_FORM}")
        prompts.append(prompt)
    return prompts
