"""The text tokenizer as a release carries it.

Kind ``emu35`` is written in the official form, four facts in three files:

- ``emu3.tiktoken``: the Qwen table, a checked copy;
- ``emu3_vision_tokens.txt``: one special string a line, the image layout tokens first and then the
  visual tokens by code. With the full codebook its hash equals that of the official file;
- ``tokenizer_config.json``: which class reads them (``tokenization_emu3.Emu3Tokenizer``). Ours is
  written from these facts and so differs in bytes from the official file. It names no ``bos_token``
  and the like among the keys that transformers interprets: the official class is not yet able to
  accept them while it is being constructed, and the official code sets them afterwards. They stand
  under ``emu35_special_tokens`` for whoever reads the file.

The class itself is part of the official code and is not copied: put ``tokenization_emu3.py`` beside
the three files, or copy them over the folder where that code keeps its own.

Kind ``bytes`` has no official form; ``bytes_tokenizer.json`` records its geometry.
"""

import json
from pathlib import Path
from typing import Any, cast

from emu35.config.tokenizer import TokenizerConfig, TokenizerKind
from emu35.errors import ReleaseError
from emu35.tokens.table import read_table, table_path, write_file
from emu35.tokens.text import TextTokenizer, build_text_tokenizer
from emu35.tokens.vocabulary import Vocabulary, vocabulary_of

TABLE_FILE = "emu3.tiktoken"
VISION_FILE = "emu3_vision_tokens.txt"
CONFIG_FILE = "tokenizer_config.json"
BYTES_FILE = "bytes_tokenizer.json"

_BYTES_FORMAT = 1


def write_text_tokenizer(folder: Path, *, config: TokenizerConfig) -> list[Path]:
    """Write the tokenizer that ``config`` describes; return the files, in the order written.

    Raises:
        TokenizerError: if the text table is missing or differs.
        ReleaseError: if the folder cannot be written.
    """
    vocabulary = vocabulary_of(config)
    if config.kind is TokenizerKind.bytes:
        contents = {BYTES_FILE: _json(_bytes_facts(vocabulary))}
    else:
        contents = {
            TABLE_FILE: read_table(table_path(config.table)),
            VISION_FILE: vision_tokens(vocabulary),
            CONFIG_FILE: _json(_official_facts(vocabulary)),
        }
    try:
        for name, content in contents.items():
            write_file(folder / name, content=content)
    except OSError as error:
        raise ReleaseError(
            f"cannot write the text tokenizer to {folder} ({error.strerror}); "
            "free some space or choose another folder"
        ) from None
    return [folder / name for name in contents]


def read_text_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of a release folder, official or ours.

    Raises:
        ReleaseError: if files are missing or do not belong together.
        TokenizerError: if the text table differs from the released one.
    """
    return build_text_tokenizer(text_tokenizer_config(folder))


def text_tokenizer_config(folder: Path) -> TokenizerConfig:
    """The configuration section that rebuilds the tokenizer of a release folder.

    Raises:
        ReleaseError: if files are missing or do not belong together.
    """
    if (folder / BYTES_FILE).exists():
        return _read_bytes_facts(folder / BYTES_FILE)
    for name in (TABLE_FILE, VISION_FILE):
        if not (folder / name).is_file():
            raise ReleaseError(
                f"{folder} holds no text tokenizer: {name} is missing; it needs {TABLE_FILE} and "
                f"{VISION_FILE}, or {BYTES_FILE}"
            )
    content = (folder / VISION_FILE).read_bytes()
    layout = 3
    codebook_size = content.count(b"\n") - layout
    config = TokenizerConfig(
        kind=TokenizerKind.emu35, codebook_size=codebook_size, table=str(folder / TABLE_FILE)
    )
    if codebook_size < 1 or vision_tokens(vocabulary_of(config)) != content:
        raise ReleaseError(
            f"{folder / VISION_FILE} is not a list of visual tokens in order; "
            "export the release again"
        )
    return config


def vision_tokens(vocabulary: Vocabulary) -> bytes:
    """Content of ``emu3_vision_tokens.txt``."""
    lines = [vocabulary.special_string(id) for id in range(vocabulary.img, vocabulary.size)]
    return "".join(f"{line}\n" for line in lines).encode()


def _official_facts(vocabulary: Vocabulary) -> dict[str, Any]:
    roles = ("pad", "bos", "eos", "eol", "eof", "tms", "img", "boi", "eoi")
    roles += ("bss", "ess", "bog", "eog", "boc", "eoc")
    return {
        "tokenizer_class": "Emu3Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_emu3.Emu3Tokenizer", None]},
        "add_bos_token": False,
        "added_tokens_decoder": {},
        "clean_up_tokenization_spaces": False,
        "emu35_special_tokens": {
            role: vocabulary.special_string(getattr(vocabulary, role)) for role in roles
        },
        "emu35_vocabulary_size": vocabulary.size,
    }


def _bytes_facts(vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "format": _BYTES_FORMAT,
        "kind": TokenizerKind.bytes.value,
        "n_text": vocabulary.n_text,
        "codebook_size": vocabulary.codebook_size,
        "vocabulary_size": vocabulary.size,
        "visual_start": vocabulary.visual_start,
        "special_tokens": vocabulary.special_strings(),
    }


def _read_bytes_facts(path: Path) -> TokenizerConfig:
    try:
        facts: object = json.loads(path.read_bytes())
    except ValueError as error:
        raise ReleaseError(f"{path} is not JSON ({error}); export the release again") from None
    size = cast(dict[str, Any], facts).get("codebook_size") if isinstance(facts, dict) else None
    if not isinstance(size, int) or size < 1:
        raise ReleaseError(f"{path} names no codebook_size; export the release again")
    config = TokenizerConfig(kind=TokenizerKind.bytes, codebook_size=size)
    expected = _bytes_facts(vocabulary_of(config))
    if facts != expected:
        found = cast(dict[str, Any], facts)
        wrong = sorted(key for key in expected if found.get(key) != expected[key])
        raise ReleaseError(
            f"{path} has other values of {', '.join(wrong) or 'unknown keys'} than this version "
            "of emu35 uses; read it with the version that wrote it"
        )
    return config


def _json(facts: dict[str, Any]) -> bytes:
    return (json.dumps(facts, indent=2) + "\n").encode()
