"""``emu35 data tokenize``: pictures to codes on disk."""

import argparse
from pathlib import Path

from emu35.config.area import parse_area
from emu35.run.arguments import Commands
from emu35.run.arguments.trust import add_trust, codec_trust

AREA = "512x512"


def add(actions: "Commands[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    text = "pictures to codes on disk, once: image tars (img2dataset) and folders to tars of codes"
    command = actions.add_parser(
        "tokenize",
        help=text,
        description=text + ". Captions and metadata go along, so that `emu35 data ingest` makes "
        "token shards of the tars without a GPU. Run again, it goes on where it was stopped. "
        "Pictures that cannot be used are counted and named in rejects.jsonl; usage.json and "
        "usage.npy tell how much of the codebook is used.",
    )
    command.add_argument("inputs", nargs="+", type=Path, metavar="PATH", help="tar or folder")
    command.add_argument(
        "--vision", type=Path, required=True, metavar="FOLDER", help="image tokenizer"
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="tars of codes go here"
    )
    command.add_argument("--source", metavar="NAME", help="name of the tars (default: DIR's)")
    command.add_argument(
        "--area",
        default=AREA,
        metavar="PIXELS",
        help="pictures are resized to about this area, aspect kept: a number, WxH, a range such as "
        f"512x512..1024x1024, or an upper bound such as ..512x512 (default {AREA})",
    )
    add_trust(command)
    command.add_argument("--shard-bytes", type=int, default=256 * 2**20, metavar="N")
    command.add_argument(
        "--images-per-call",
        type=int,
        default=16,
        metavar="N",
        help="pictures of one size that are encoded together (default 16)",
    )
    command.add_argument("--threads", type=int, default=2, metavar="N", help="to open pictures")
    command.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes, each at a tar or a stretch of a folder; the tars of codes are the same "
        "for any N; GPUs are taken in turn (default 1)",
    )
    command.add_argument(
        "--max-rejects",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="an input of which more is rejected fails (default 0.5)",
    )
    command.add_argument(
        "--replace", action="store_true", help="start over instead of going on with DIR"
    )
    command.set_defaults(handler=_tokenize)


def _tokenize(arguments: argparse.Namespace) -> int:
    from emu35.data.codes.options import TokenizeOptions
    from emu35.data.ingest.options import Existing
    from emu35.stages.tokenize import tokenize

    out: Path = arguments.out
    tokenize(
        TokenizeOptions(
            inputs=arguments.inputs,
            out=out,
            source=arguments.source or out.absolute().name,
            vision=arguments.vision,
            area=parse_area(arguments.area),
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
