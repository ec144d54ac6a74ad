"""``emu35 tokens encode|decode``: JSON lines on standard input and output."""

import argparse
import sys
from collections.abc import Iterable, Iterator

from emu35.errors import ConfigError, DataError
from emu35.run.arguments import Commands
from emu35.run.arguments.tokenizer import add_tokenizer, tokenizer_config


def add(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    text = "texts and documents to ids, and back; JSON lines"
    actions = commands.add_parser("tokens", help=text, description=text).add_subparsers(
        required=True, metavar="ACTION"
    )
    encode = actions.add_parser(
        "encode",
        help='{"text": "..."} or a document -> {"ids": [...]}',
        description="Read JSON lines from standard input: a text, or a document "
        '{"parts": [{"text": "..."}, {"codes": [[0, 1]]}]}; write {"ids": [...]} for each.',
    )
    add_tokenizer(encode)
    encode.add_argument(
        "--allow-special",
        action="store_true",
        help="parse special strings inside text, as the official tokenizer does",
    )
    encode.set_defaults(handler=_encode)
    decode = actions.add_parser(
        "decode",
        help='{"ids": [...]} -> {"text": "..."}, with parts where there are images',
        description='Read JSON lines {"ids": [...]} from standard input; write the text of each, '
        "and its parts where there is more than text.",
    )
    add_tokenizer(decode)
    decode.set_defaults(handler=_decode)


def _encode(arguments: argparse.Namespace) -> int:
    from emu35.tokens.jsonl import encode_lines

    tokenizer = _build(arguments)
    _write(encode_lines(_stdin(), tokenizer=tokenizer, allow_special=arguments.allow_special))
    return 0


def _decode(arguments: argparse.Namespace) -> int:
    from emu35.tokens.jsonl import decode_lines

    _write(decode_lines(_stdin(), tokenizer=_build(arguments)))
    return 0


def _build(arguments: argparse.Namespace):
    from emu35.tokens.text import build_text_tokenizer

    config = tokenizer_config(arguments)
    if problems := list(config.problems()):
        raise ConfigError(problems)
    return build_text_tokenizer(config)


def _stdin() -> Iterator[str]:
    """Lines of standard input as UTF-8, whatever the locale says."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"line {number} is not UTF-8 ({error.reason}); convert it") from None


def _write(lines: Iterable[str]) -> None:
    """Line by line, so that a program at the other end of a pipe gets each answer at once."""
    for line in lines:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
