"""Whether code of an image tokenizer of another package may be run."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emu35.vision.plugged import CodecTrust


def add_trust(command: argparse.ArgumentParser) -> None:
    """Add ``--trust-codec`` to ``command``."""
    command.add_argument(
        "--trust-codec",
        action="store_true",
        help="run the code of another package that codec.yaml of the image tokenizer names",
    )


def codec_trust(arguments: argparse.Namespace) -> "CodecTrust":
    """What ``--trust-codec`` says."""
    from emu35.vision.plugged import CodecTrust

    return CodecTrust.given if arguments.trust_codec else CodecTrust.environment
