"""The three arguments that choose a tokenizer, shared by several subcommands."""

import argparse
from dataclasses import replace

from emu35.config.tokenizer import TokenizerConfig, TokenizerKind

KINDS = tuple(kind.value for kind in TokenizerKind)


def add_tokenizer(command: argparse.ArgumentParser, *, default: str = "bytes") -> None:
    """Add ``--tokenizer``, ``--codebook-size`` and ``--table`` to ``command``."""
    command.add_argument(
        "--tokenizer",
        choices=KINDS,
        default=default,
        help=f"emu35: the released ids; bytes: needs no file (default {default})",
    )
    command.add_argument(
        "--codebook-size",
        type=int,
        metavar="N",
        help="number of visual codes (default 131072 for emu35, 1024 for bytes)",
    )
    command.add_argument(
        "--table",
        metavar="FILE",
        help="text table of the emu35 tokenizer (default: the cache that fetch_tokenizer.py fills)",
    )


def tokenizer_config(
    arguments: argparse.Namespace, *, vision: str | None = None
) -> TokenizerConfig:
    """The configuration that the arguments describe; ``vision`` is the image tokenizer's folder."""
    kind = TokenizerKind(arguments.tokenizer)
    usual = 131072 if kind is TokenizerKind.emu35 else TokenizerConfig().codebook_size
    return TokenizerConfig(
        kind=kind,
        codebook_size=usual if arguments.codebook_size is None else arguments.codebook_size,
        table=arguments.table,
        vision=vision,
    )


def explicit_tokenizer(arguments: argparse.Namespace, *, base: TokenizerConfig) -> TokenizerConfig:
    """``base`` with what the arguments give (``vision`` among them) in place of its own; another
    kind of tokenizer leaves nothing of it but the image tokenizer."""
    if arguments.tokenizer is not None and arguments.tokenizer != base.kind.value:
        return tokenizer_config(arguments, vision=arguments.vision or base.vision)
    given = {
        name: value
        for name in ("codebook_size", "table", "vision")
        if (value := getattr(arguments, name)) is not None
    }
    return replace(base, **given)
