"""The tokenizer files of a release."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from emu35.config import TokenizerConfig, TokenizerKind
from emu35.errors import ReleaseError, TokenizerError
from emu35.tokens.release_files import read_text_tokenizer, write_text_tokenizer

BYTES = TokenizerConfig(kind=TokenizerKind.bytes, codebook_size=777)


@pytest.mark.golden
def test_official_files_equal_the_released_ones(
    tmp_path: Path, released_config: TokenizerConfig, golden_tokenizer: dict[str, Any]
) -> None:
    paths = write_text_tokenizer(tmp_path / "text_tokenizer", config=released_config)
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    official = golden_tokenizer["meta"]["files"]
    for name in ("emu3.tiktoken", "emu3_vision_tokens.txt"):
        assert hashes[name] == official[name]
    assert sorted(path.name for path in (tmp_path / "text_tokenizer").iterdir()) == sorted(hashes)
    facts = json.loads((tmp_path / "text_tokenizer" / "tokenizer_config.json").read_text())
    assert facts["tokenizer_class"] == "Emu3Tokenizer"
    assert facts["auto_map"]["AutoTokenizer"][0] == "tokenization_emu3.Emu3Tokenizer"
    assert facts["emu35_special_tokens"]["bos"] == "<|extra_203|>"
    # Names that transformers interprets make the official class fail while it is constructed.
    assert not {"bos_token", "eos_token", "pad_token"} & facts.keys()


@pytest.mark.golden
@pytest.mark.parametrize("codebook_size", [131072, 64])
def test_official_files_read_back(tmp_path: Path, table: Path, codebook_size: int) -> None:
    config = TokenizerConfig(
        kind=TokenizerKind.emu35, codebook_size=codebook_size, table=str(table)
    )
    write_text_tokenizer(tmp_path, config=config)
    tokenizer = read_text_tokenizer(tmp_path)
    assert tokenizer.vocabulary.codebook_size == codebook_size
    text = "a red circle <|visual token 000063|>"
    assert tokenizer.encode(text, allow_special=True)[-1] == tokenizer.vocabulary.visual(63)


def test_byte_tokenizer_reads_back(tmp_path: Path) -> None:
    write_text_tokenizer(tmp_path, config=BYTES)
    tokenizer = read_text_tokenizer(tmp_path)
    assert tokenizer.vocabulary.codebook_size == 777
    assert tokenizer.encode("hi") == [*b"hi"]


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b", "a"):
        write_text_tokenizer(tmp_path / folder, config=BYTES)
    first, second = (tmp_path / name / "bytes_tokenizer.json" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_other_geometry_is_refused(tmp_path: Path) -> None:
    (path,) = write_text_tokenizer(tmp_path, config=BYTES)
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"n_text": 300}))
    with pytest.raises(ReleaseError, match="other values of n_text"):
        read_text_tokenizer(tmp_path)
    path.write_text(json.dumps({}))
    with pytest.raises(ReleaseError, match="names no codebook_size"):
        read_text_tokenizer(tmp_path)
    path.write_text("{")
    with pytest.raises(ReleaseError, match="is not JSON"):
        read_text_tokenizer(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"emu3\.tiktoken is missing"):
        read_text_tokenizer(tmp_path)
    (tmp_path / "emu3.tiktoken").write_bytes(b"IQ== 0\n")
    with pytest.raises(ReleaseError, match=r"emu3_vision_tokens\.txt is missing"):
        read_text_tokenizer(tmp_path)
    (tmp_path / "emu3_vision_tokens.txt").write_text("<|image token|>\n")
    with pytest.raises(ReleaseError, match="not a list of visual tokens"):
        read_text_tokenizer(tmp_path)
    lines = ["<|image token|>", "<|image start|>", "<|image end|>", "<|visual token 000000|>"]
    (tmp_path / "emu3_vision_tokens.txt").write_text("\n".join([*lines, ""]))
    with pytest.raises(TokenizerError, match="sha256"):
        read_text_tokenizer(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ReleaseError, match="cannot write the text tokenizer"):
        write_text_tokenizer(tmp_path / "file" / "folder", config=BYTES)
