"""Text to ids and back, against the official values and against tiktoken with specials."""

import pickle
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emu35.config import TokenizerConfig, TokenizerKind
from emu35.errors import TokenizerError
from emu35.tokens.table import parse_table
from emu35.tokens.text import SPLIT_PATTERN, TextTokenizer, build_text_tokenizer

CODEBOOK = 16

SPECIALS = [
    "<|image start|>",
    "<|image end|>",
    "<|image token|>",
    "<|visual token 000001|>",
    "<|visual token 000016|>",
    "<|extra_203|>",
    "<|extra_205|>",
    "<|extra_01|>",
    "<|endoftext|>",
    "<|im_start|>",
]
FRAGMENTS = [*SPECIALS, "<|", "|>", "<|image", " start|>", " ", "\n", "\u0301", "\u0338", "7*9"]

# Text as it comes from outside: any characters, lone surrogates, and attempts at special tokens.
anything = st.text(st.characters(codec=None) | st.characters(categories=["Cs"]), max_size=20)
hostile = st.lists(st.sampled_from(FRAGMENTS) | anything, max_size=8).map("".join)
relaxed = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session", params=["bytes", "emu35"])
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    kind = TokenizerKind(request.param)
    table = str(request.getfixturevalue("table")) if kind is TokenizerKind.emu35 else None
    return build_text_tokenizer(TokenizerConfig(kind=kind, codebook_size=CODEBOOK, table=table))


@pytest.fixture(scope="session")
def official(table: Path) -> tiktoken.Encoding:
    """tiktoken with every special registered, as the official tokenizer builds it."""
    config = TokenizerConfig(kind=TokenizerKind.emu35, codebook_size=CODEBOOK, table=str(table))
    vocabulary = build_text_tokenizer(config).vocabulary
    specials = {
        vocabulary.special_string(id): id for id in range(vocabulary.n_text, vocabulary.size)
    }
    return tiktoken.Encoding(
        "official",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=parse_table(table.read_bytes()),
        special_tokens=specials,
    )


def as_read(text: str) -> str:
    """What a tokenizer sees: NFC, surrogates repaired."""
    text = unicodedata.normalize("NFC", text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@pytest.mark.golden
def test_samples_equal_the_official_ids(
    released: TextTokenizer, golden_tokenizer: dict[str, Any]
) -> None:
    for sample in golden_tokenizer["samples"]:
        ids = released.encode(sample["text"], allow_special=True)
        assert ids == sample["ids"], sample["text"]
        assert len(ids) == sample["n"]
        assert (released.encode(sample["text"]) == ids) is sample["same_with_special"]
        assert released.decode(ids) == sample["decoded"]


@pytest.mark.golden
def test_specials_and_digits_equal_the_official_ids(
    released: TextTokenizer, golden_tokenizer: dict[str, Any]
) -> None:
    meta = golden_tokenizer["meta"]
    for text, id in meta["special"].items():
        assert released.encode(text, allow_special=True) == [id]
        assert released.decode([id]) == text
        assert released.vocabulary.n_text > max(released.encode(text))
    for digit, id in meta["digits"].items():
        assert released.encode(digit) == [id]


@pytest.mark.golden
def test_every_special_parses_to_its_id(released: TextTokenizer) -> None:
    vocabulary = released.vocabulary
    ids = list(range(vocabulary.n_text, vocabulary.size))
    text = released.decode(ids)
    assert text.count("|><|") == 131_283 - 1
    assert released.encode(text, allow_special=True) == ids


@relaxed
@given(hostile)
def test_text_never_becomes_a_special(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= id < tokenizer.vocabulary.n_text for id in ids)
    assert tokenizer.decode(ids) == as_read(text)


@relaxed
@given(hostile)
def test_specials_round_trip_when_allowed(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, allow_special=True)
    assert tokenizer.decode(ids) == as_read(text)


@pytest.mark.golden
@relaxed
@given(hostile)
def test_parsing_specials_equals_tiktoken(official: tiktoken.Encoding, text: str) -> None:
    config = TokenizerConfig(kind=TokenizerKind.emu35, codebook_size=CODEBOOK)
    ours = build_text_tokenizer(config).encode(text, allow_special=True)
    normal = unicodedata.normalize("NFC", text)
    assert ours == official.encode(normal, allowed_special="all", disallowed_special=())


@pytest.mark.golden
@relaxed
@given(st.lists(st.integers(0, 151_643 + 211 + CODEBOOK - 1), max_size=40))
def test_decoding_any_ids_equals_tiktoken(official: tiktoken.Encoding, ids: list[int]) -> None:
    config = TokenizerConfig(kind=TokenizerKind.emu35, codebook_size=CODEBOOK)
    assert build_text_tokenizer(config).decode(ids) == official.decode(ids, errors="replace")


def test_a_million_blanks_do_not_stop_the_tokenizer(tokenizer: TextTokenizer) -> None:
    # tiktoken's regular-expression engine aborts on this text.
    text = "a" + " " * 1_000_100 + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.golden
def test_long_text_is_cut_nowhere(released: TextTokenizer, official: tiktoken.Encoding) -> None:
    text = "It's  1 long\n\n story. " * 45_000
    assert released.encode(text) == official.encode_ordinary(text)


def test_ids_outside_the_vocabulary_are_named(tokenizer: TextTokenizer) -> None:
    size = tokenizer.vocabulary.size
    for id in (size, -1):
        with pytest.raises(TokenizerError, match=f"id {id} lies outside the vocabulary of {size}"):
            tokenizer.decode([0, id])


def test_numpy_ids_decode(tokenizer: TextTokenizer) -> None:
    ids = np.array([*tokenizer.encode("hi"), tokenizer.vocabulary.bos], dtype=np.uint32)
    assert tokenizer.decode(ids) == "hi<|extra_203|>"


def test_tokenizer_travels_to_another_process(tokenizer: TextTokenizer) -> None:
    data = pickle.dumps(tokenizer)
    assert len(data) < 2000
    assert pickle.loads(data).encode("a red circle") == tokenizer.encode("a red circle")


def test_missing_table_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMU35_CACHE", str(tmp_path))
    with pytest.raises(TokenizerError, match=r"does not exist.*scripts/fetch_tokenizer\.py"):
        build_text_tokenizer(TokenizerConfig(kind=TokenizerKind.emu35))


def test_foreign_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.tiktoken"
    path.write_bytes(b"IQ== 0\n")
    with pytest.raises(TokenizerError, match=r"sha256.*expected.*scripts/fetch_tokenizer\.py"):
        build_text_tokenizer(TokenizerConfig(kind=TokenizerKind.emu35, table=str(path)))


def test_tokens_never_import_torch() -> None:
    code = (
        "import sys\n"
        "import emu35.tokens.jsonl, emu35.tokens.template, emu35.tokens.release_files\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
