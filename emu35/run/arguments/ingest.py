"""``emu35 data ingest``: files to token shards."""

import argparse
from pathlib import Path

from emu35.config.area import parse_area
from emu35.errors import ConfigError
from emu35.run.arguments import Commands
from emu35.run.arguments.recipe import Recipe, read_recipe
from emu35.run.arguments.tokenizer import add_tokenizer, explicit_tokenizer, tokenizer_config
from emu35.run.arguments.trust import add_trust, codec_trust

ORDERS = ("caption_first", "image_first", "both")
TEXT_UNITS = ("file", "lines")
STARTS = ("first", "random", "all")
AREA = "512x512"
LAYOUTS = ("isg_bench", "opening", "mmie")
DEDUPS = ("none", "record", "picture")


def add(actions: "Commands[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    text = (
        "files to token shards: tars of image and caption (img2dataset), JSON lines and parquet "
        "(pairs, OBELICS, LLaVA, edits, tasks), folders, text"
    )
    command = actions.add_parser(
        "ingest",
        help=text,
        description=text + ". Run again, it goes on where it was stopped. Records that cannot be "
        "used are counted and named in rejects.jsonl.",
    )
    command.add_argument("inputs", nargs="+", type=Path, metavar="PATH", help="file or folder")
    command.add_argument("--out", type=Path, metavar="DIR", help="shards go here")
    command.add_argument("--source", metavar="NAME", help="name of the shards (default: DIR's)")
    command.add_argument(
        "--recipe",
        metavar="EXPERIMENT",
        help="take DIR, --area, the tokenizer and --sequence-length from this experiment and its "
        "source NAME (validation.NAME: its validation set); options that are given win",
    )
    command.add_argument(
        "--configs", type=Path, metavar="DIR", help="folder of more groups and experiments"
    )
    add_tokenizer(command)
    # Left empty, so that a recipe is asked before the default is taken.
    command.set_defaults(tokenizer=None)
    command.add_argument(
        "--vision", metavar="DIR", help="image tokenizer; not needed where there are no pictures"
    )
    add_trust(command)
    command.add_argument(
        "--area",
        metavar="PIXELS",
        help="pictures are resized to about this area, aspect kept: a number, WxH, a range such as "
        f"512x512..1024x1024, or an upper bound such as ..512x512 (default {AREA})",
    )
    command.add_argument(
        "--order",
        choices=ORDERS,
        default="caption_first",
        help="of a picture and its caption; both writes two sources below DIR",
    )
    command.add_argument(
        "--text-unit", choices=TEXT_UNITS, default="file", help="one document is a file, or a line"
    )
    command.add_argument(
        "--starts",
        choices=STARTS,
        default="random",
        help="documents of a vla record besides the whole: none, from one random later step "
        "(default), or from every one",
    )
    command.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="PATH is this benchmark as published: one document of question and ground truth an "
        "item",
    )
    command.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="reject pictures and task documents that are longer in tokens, and split videos of "
        "--group-by between clips (default 0: no limit)",
    )
    _add_selection(command)
    _add_work(command)
    command.add_argument(
        "--max-rejects",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="an input of which more is rejected, duplicates not counted, fails (default 0.5)",
    )
    command.add_argument(
        "--replace", action="store_true", help="start over instead of going on with DIR"
    )
    command.set_defaults(handler=_ingest)


def _add_selection(command: argparse.ArgumentParser) -> None:
    """What of the inputs becomes documents, and how records are joined."""
    command.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="relative picture paths in records start here (default: the folder of their file)",
    )
    command.add_argument(
        "--dedup",
        choices=DEDUPS,
        default="none",
        help="reject a document that repeats an earlier one, of any input: its tokens (record), or "
        "the bytes of all its pictures in order (picture; documents without one stay). Duplicates "
        "are found when shards are written, so that they cost encoding all the same",
    )
    command.add_argument(
        "--group-by",
        metavar="FIELD",
        help="records are clips, and FIELD names their video: clips of one video in one input "
        "become one document. Each input is read to its end first; its pictures wait in TMPDIR",
    )
    command.add_argument(
        "--order-by",
        metavar="FIELD",
        help="when a clip starts, in seconds or h:mm:ss (default: start, clip_start, begin or "
        "start_time)",
    )


def _add_work(command: argparse.ArgumentParser) -> None:
    """How the work is done, which changes no document."""
    command.add_argument("--shard-bytes", type=int, default=256 * 2**20, metavar="N")
    command.add_argument(
        "--images-per-call", type=int, default=16, metavar="N", help="pictures encoded together"
    )
    command.add_argument("--threads", type=int, default=2, metavar="N", help="to open pictures")
    command.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes, each at an input of its own; one file is one worker's work, so split huge "
        "files. The shards are the same for any N; GPUs are taken in turn (default 1)",
    )


def _ingest(arguments: argparse.Namespace) -> int:
    from emu35.data.ingest.options import Dedup, Existing, IngestOptions, PairOrder
    from emu35.data.readers.benchmarks import Layout
    from emu35.data.readers.clips import ClipFields
    from emu35.data.readers.discover import TextUnit
    from emu35.data.readers.task_documents import Starts
    from emu35.stages.data import ingest

    if arguments.order_by is not None and arguments.group_by is None:
        raise ConfigError(
            "--order-by says when the clips of a video start; name the video, too, with --group-by"
        )
    clips = None
    if arguments.group_by is not None:
        clips = ClipFields(group=arguments.group_by, order=arguments.order_by or "")
    recipe = _recipe(arguments)
    out: Path | None = arguments.out or recipe.out
    if out is None:
        raise ConfigError("--out is not given; name the folder for the shards, or a --recipe")
    area: str = arguments.area or recipe.area or AREA
    given: int | None = arguments.sequence_length
    length = recipe.sequence_length if given is None else given
    if recipe.title is not None:
        print(
            f"{recipe.title}: out {out}, area {area}, tokenizer {recipe.tokenizer.kind.value}, "
            f"sequence length {length}"
        )
    ingest(
        IngestOptions(
            inputs=arguments.inputs,
            out=out,
            source=recipe.source or arguments.source or out.absolute().name,
            tokenizer=recipe.tokenizer,
            area=parse_area(area),
            order=PairOrder(arguments.order),
            text_unit=TextUnit(arguments.text_unit),
            starts=Starts(arguments.starts),
            layout=Layout(arguments.layout) if arguments.layout else None,
            pictures=arguments.pictures,
            dedup=Dedup(arguments.dedup),
            clips=clips,
            sequence_length=length,
            workers=arguments.workers,
            shard_bytes=arguments.shard_bytes,
            images_per_call=arguments.images_per_call,
            threads=arguments.threads,
            max_rejects=arguments.max_rejects,
            existing=Existing.replace if arguments.replace else Existing.resume,
        ),
        trust=codec_trust(arguments),
    )
    return 0


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """What the experiment says, or without one what holds by default, with the given tokenizer."""
    if arguments.recipe is None:
        if arguments.configs is not None:
            raise ConfigError("--configs is where a --recipe is looked for; give both or neither")
        arguments.tokenizer = arguments.tokenizer or "bytes"
        return Recipe(tokenizer=tokenizer_config(arguments, vision=arguments.vision))
    recipe = read_recipe(arguments.recipe, source=arguments.source, configs=arguments.configs)
    recipe.tokenizer = explicit_tokenizer(arguments, base=recipe.tokenizer)
    return recipe
