"""The map of ids, against the released one and against itself."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu35.config import TokenizerConfig, TokenizerKind
from emu35.errors import TokenizerError
from emu35.tokens.vocabulary import Vocabulary, vocabulary_of

RELEASED = vocabulary_of(TokenizerConfig(kind=TokenizerKind.emu35, codebook_size=131072))

ALIASES = {
    "pad": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "bos": "<|extra_203|>",
    "eos": "<|extra_204|>",
    "eol": "<|extra_200|>",
    "eof": "<|extra_201|>",
    "tms": "<|extra_202|>",
    "bss": "<|extra_100|>",
    "ess": "<|extra_101|>",
    "bog": "<|extra_60|>",
    "eog": "<|extra_61|>",
    "boc": "<|extra_50|>",
    "eoc": "<|extra_51|>",
    "img": "<|image token|>",
    "boi": "<|image start|>",
    "eoi": "<|image end|>",
}


@pytest.mark.golden
def test_released_ids_equal_the_official_ones(golden_tokenizer: dict[str, Any]) -> None:
    meta = golden_tokenizer["meta"]
    for text, id in meta["special"].items():
        assert RELEASED.special_id(text) == id
        assert RELEASED.special_string(id) == text
    assert RELEASED.n_text == meta["n_mergeable"]
    assert RELEASED.size == meta["vocab_size"]
    assert RELEASED.size - RELEASED.n_text == meta["n_special"]
    assert RELEASED.pad == meta["eot"]


@pytest.mark.parametrize(("name", "text"), ALIASES.items())
def test_alias_is_the_token_of_the_release(name: str, text: str) -> None:
    assert RELEASED.special_string(getattr(RELEASED, name)) == text


@given(st.integers(1, 10_000), st.integers(1, 1_000_000), st.data())
def test_every_id_after_the_text_has_one_string(
    n_text: int, codebook_size: int, data: st.DataObject
) -> None:
    vocabulary = Vocabulary(n_text=n_text, codebook_size=codebook_size)
    assert vocabulary.size == n_text + 211 + codebook_size
    id = data.draw(st.integers(n_text, vocabulary.size - 1))
    assert vocabulary.special_id(vocabulary.special_string(id)) == id
    if vocabulary.is_visual(id):
        assert vocabulary.visual(vocabulary.code(id)) == id


def test_special_strings_cover_text_end_to_visual_start() -> None:
    strings = RELEASED.special_strings()
    assert list(strings.values()) == list(range(RELEASED.n_text, RELEASED.visual_start))
    assert not any("visual" in text for text in strings)


@pytest.mark.parametrize(
    "text",
    ["<|extra_205|>", "<|extra_07|>", "<|visual token 131072|>", "<|visual token 42|>", "", "a"],
)
def test_near_misses_are_no_specials(text: str) -> None:
    assert RELEASED.special_id(text) is None


def test_what_does_not_exist_is_an_error_that_names_the_range() -> None:
    with pytest.raises(TokenizerError, match=r"131072 must lie in 0\.\.131071"):
        RELEASED.visual(131072)
    with pytest.raises(TokenizerError, match=r"151853 is no visual token"):
        RELEASED.code(RELEASED.eoi)
    with pytest.raises(TokenizerError, match="204"):
        RELEASED.extra(205)
    with pytest.raises(TokenizerError, match="282926"):
        RELEASED.check(282926)
    with pytest.raises(TokenizerError, match="six digits"):
        Vocabulary(n_text=256, codebook_size=1_000_001)
