"""``emu35 generate``: prompts to pictures and text, from a run or a release."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from emu35.run.arguments import Commands
from emu35.run.arguments.source import add_source, end_without_leading, read_source

if TYPE_CHECKING:
    from emu35.stages.generate.options import GenerateOptions

SAMPLERS = ("kinetic_euler", "entropy_bound", "maskgit", "remdm")
TASKS = ("t2i", "x2i", "howto", "story", "explore", "vla", "chat")

RECORDS = """\
A line of the prompts' file is a JSON object with a prompt. It may also set id, task, images (paths
relative to the file), size, ratio, seed, guidance, temperature, top_k, top_p, text_temperature,
text_top_k, text_top_p, max_new_tokens, steps, stop, decoder, denoise_steps, sampler,
denoise_shift and guidance_until, each in place of what the call says."""


def add(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    text = "pictures and text from prompts, by a run or a release"
    command = commands.add_parser("generate", help=text, description=text, epilog=RECORDS)
    add_source(command)
    command.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be repeated"
    )
    command.add_argument(
        "--prompts-file", type=Path, metavar="JSONL", help="more prompts, a record a line"
    )
    command.add_argument(
        "--interactive",
        action="store_true",
        help="a dialogue: a turn for each line read (explore, chat, story, howto, vla); /help "
        "lists what else can be typed",
    )
    command.add_argument(
        "--image",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="reference image of every prompt; may be repeated",
    )
    add_asked(command)
    _add_decoder(command)
    _add_output(command)
    command.set_defaults(handler=_generate)


def add_asked(command: argparse.ArgumentParser) -> None:
    """Describe what is asked of every prompt, and how many at a time."""
    command.add_argument("--task", choices=TASKS, default="t2i")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--batch-size", type=int, default=16, help="prompts at a time")
    command.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="slots of the key-value cache (default: what the prompts need, as far as memory goes)",
    )
    _add_form(command)
    _add_end(command)
    _add_sampling(command)


def _add_form(command: argparse.ArgumentParser) -> None:
    grid = command.add_mutually_exclusive_group()
    grid.add_argument("--size", metavar="HxW", help="grid of each image in codes, such as 64x48")
    grid.add_argument("--ratio", help="aspect ratio such as 16:9; auto: the model decides")
    command.add_argument(
        "--image-area", type=int, metavar="PIXELS", help="references are resized to this area"
    )


def _add_end(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--steps", type=int, metavar="N", help="an answer ends with its N-th picture"
    )
    command.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="an answer ends where it says this; may be repeated",
    )
    command.add_argument("--max-new-tokens", type=int, metavar="N")


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the text of a single prompt while it comes (default: on a terminal)",
    )
    command.add_argument(
        "--logprobs",
        action="store_true",
        help="results.jsonl also tells the log-probability of every token, and which were forced",
    )
    command.add_argument(
        "--page",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="index.html with all answers (default: for at most 200 prompts)",
    )
    command.add_argument(
        "--story",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="each answer also as protobuf (emu3p5.story), which the official viewer reads",
    )


def _add_sampling(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("sampling", "default: what the task recommends")
    group.add_argument("--guidance", type=float, help="1: off, and half the work")
    # Without a prefix an option holds for images: that is what most calls generate.
    for prefix, what in (("", "images"), ("text-", "text")):
        group.add_argument(f"--{prefix}temperature", type=float, help=f"for {what}")
        group.add_argument(f"--{prefix}top-k", type=int, metavar="K", help=f"for {what}")
        group.add_argument(f"--{prefix}top-p", type=float, metavar="P", help=f"for {what}")


def _add_decoder(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("parallel decoding", "by a source of stage=dida")
    group.add_argument(
        "--decoder",
        choices=("ar", "dida"),
        default="ar",
        help="pictures token by token (ar, the default), or all codes at once in some steps",
    )
    group.add_argument("--denoise-steps", type=int, metavar="N", help="forwards a picture (25)")
    group.add_argument("--sampler", choices=SAMPLERS, help="of the steps (kinetic_euler)")
    group.add_argument(
        "--denoise-shift",
        type=float,
        metavar="S",
        help="above 1: more of the steps near the noise (1)",
    )
    group.add_argument(
        "--guidance-until",
        type=float,
        metavar="TIME",
        help="guidance ends at this time of 0 (noise) to 1; earlier is faster (0.9)",
    )


def read_asked(arguments: argparse.Namespace) -> "GenerateOptions":
    """What the options of :func:`add_asked` say, for a source and a folder to write."""
    from emu35.inference.ask import SamplingOverride, parse_size
    from emu35.stages.generate.options import GenerateOptions
    from emu35.tokens.template import Task

    chosen = read_source(arguments)
    return GenerateOptions(
        source=arguments.source,
        prompts_file=arguments.prompts_file,
        out=arguments.out,
        task=Task(arguments.task),
        vision=arguments.vision,
        template=chosen.template,
        step=arguments.step,
        precision=chosen.precision,
        quantize=chosen.quantize,
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
        steps=arguments.steps,
        stop=arguments.stop,
        batch_size=arguments.batch_size,
        cache_tokens=arguments.cache_tokens,
        tp=arguments.tp,
    )


def _generate(arguments: argparse.Namespace) -> int:
    if (code := end_without_leading(arguments)) is not None:
        return code
    from emu35.dida.samplers import Sampler
    from emu35.inference.request import Decoder
    from emu35.stages.generate.interactive import interactive
    from emu35.stages.generate.run import generate

    options = replace(
        read_asked(arguments),
        prompts=arguments.prompt,
        images=arguments.image,
        decoder=Decoder(arguments.decoder),
        denoise_steps=arguments.denoise_steps,
        sampler=Sampler(arguments.sampler) if arguments.sampler else None,
        denoise_shift=arguments.denoise_shift,
        guidance_until=arguments.guidance_until,
        logprobs=arguments.logprobs,
        page=arguments.page,
        story=arguments.story,
        stream=arguments.stream,
    )
    if arguments.interactive:
        interactive(options)
    else:
        generate(options)
    return 0
