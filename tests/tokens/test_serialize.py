"""Documents to ids and back."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emu35.errors import DataError, TokenizerError
from emu35.tokens.document import Broken, Document, Image, Special, Text
from emu35.tokens.serialize import (
    Modality,
    deserialize,
    image_tokens,
    join_parts,
    modality_of,
    serialize,
    split_parts,
)
from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary

TEXT, VISUAL, LAYOUT, CONTROL = Modality

relaxed = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def grids(codebook_size: int) -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
    seeds = st.integers(0, 2**32 - 1)
    return st.builds(
        lambda shape, seed: np.random.default_rng(seed).integers(0, codebook_size, shape),
        shapes,
        seeds,
    )


parts = st.lists(
    st.one_of(
        st.builds(Text, st.text(max_size=12) | st.sampled_from(["<|image start|>", "3*4"])),
        st.builds(Image, grids(1000)),
        st.builds(Special, st.sampled_from(["<|extra_100|>", "<|extra_60|>", "<|endoftext|>"])),
    ),
    max_size=6,
)


@pytest.mark.golden
def test_image_grid_equals_the_official_one(
    released: TextTokenizer, golden_pipeline: dict[str, Any]
) -> None:
    golden = golden_pipeline["image_grid"]
    ids = image_tokens(np.array(golden["grid"]), released)
    assert ids == golden["ids"]
    assert released.decode(ids) == golden["string"]
    assert released.encode(golden["string"], allow_special=True) == ids
    document = deserialize(ids, released)
    assert document == Document([Image(np.array(golden["grid"]))])


@pytest.mark.golden
@relaxed
@given(grids(131072))
def test_image_equals_its_official_string(released: TextTokenizer, codes_HW: np.ndarray) -> None:
    height, width = codes_HW.shape
    rows = ["".join(f"<|visual token {code:06d}|>" for code in row) for row in codes_HW]
    string = f"<|image start|>{height}*{width}<|image token|>{'<|extra_200|>'.join(rows)}"
    ids = image_tokens(codes_HW, released)
    assert ids == released.encode(string + "<|image end|>", allow_special=True)
    size = len(f"{height}*{width}")
    assert len(ids) == height * width + (height - 1) + 3 + size


def test_a_document_byte_by_byte(byte_tokenizer: TextTokenizer) -> None:
    v = byte_tokenizer.vocabulary
    document = Document([Text("hi"), Image(np.array([[7, 8], [9, 999]])), Text("!")])
    sequence = serialize(document, byte_tokenizer)
    code = v.visual_start
    expected = [
        (v.bos, CONTROL),
        (ord("h"), TEXT),
        (ord("i"), TEXT),
        (v.boi, LAYOUT),
        (ord("2"), LAYOUT),
        (ord("*"), LAYOUT),
        (ord("2"), LAYOUT),
        (v.img, LAYOUT),
        (code + 7, VISUAL),
        (code + 8, VISUAL),
        (v.eol, LAYOUT),
        (code + 9, VISUAL),
        (code + 999, VISUAL),
        (v.eoi, LAYOUT),
        (ord("!"), TEXT),
        (v.eos, CONTROL),
    ]
    assert sequence.tokens.tolist() == [id for id, _ in expected]
    assert sequence.modality.tolist() == [modality for _, modality in expected]
    assert sequence.tokens.dtype == np.uint32
    assert sequence.modality.dtype == np.uint8
    assert len(sequence) == 16


@relaxed
@given(parts)
def test_ids_survive_the_way_back_and_forth(byte_tokenizer: TextTokenizer, parts: list) -> None:
    sequence = serialize(Document(parts), byte_tokenizer)
    again = deserialize(sequence.tokens.tolist(), byte_tokenizer)
    assert not again.problems
    assert [image.tolist() for image in again.images] == [
        part.codes_HW.tolist() for part in parts if isinstance(part, Image)
    ]
    assert serialize(again, byte_tokenizer).tokens.tolist() == sequence.tokens.tolist()


@relaxed
@given(st.data())
def test_any_ids_become_parts_and_the_same_ids_again(
    byte_tokenizer: TextTokenizer, data: st.DataObject
) -> None:
    v = byte_tokenizer.vocabulary
    # ASCII only: a text id alone need not be a whole character, and then becomes U+FFFD.
    ascii_ids = st.sampled_from([ord(character) for character in "019*a"])
    layout = st.sampled_from([v.boi, v.img, v.eol, v.eoi, v.bos, v.bss])
    id = ascii_ids | layout | st.integers(v.visual_start, v.size - 1)
    whole = grids(1000).map(lambda grid: image_tokens(grid, byte_tokenizer))
    runs = data.draw(st.lists(st.lists(id, max_size=4) | whole, max_size=8))
    ids = [id for run in runs for id in run]
    assert join_parts(split_parts(ids, byte_tokenizer), byte_tokenizer) == ids


def test_generated_marks_keep_their_place(byte_tokenizer: TextTokenizer) -> None:
    v = byte_tokenizer.vocabulary
    ids = [v.bss, v.bog, *b"plan", v.eog, *b"text", v.ess, v.eos]
    assert deserialize(ids, byte_tokenizer).parts == [
        Special("<|extra_100|>"),
        Special("<|extra_60|>"),
        Text("plan"),
        Special("<|extra_61|>"),
        Text("text"),
        Special("<|extra_101|>"),
    ]


def broken_images(v: Vocabulary) -> dict[str, tuple[list[int], str]]:
    c = v.visual_start
    return {
        "cut off": ([v.boi, *b"1*2", v.img, c], "image without an end"),
        "ragged": (
            [v.boi, *b"2*2", v.img, c, v.eol, c, c, c, v.eoi],
            "image with ragged rows",
        ),
        "too short": ([v.boi, *b"2*2", v.img, c, c, v.eoi], "image of another size than it says"),
        "no size": ([v.boi, v.img, c, v.eoi], "image without a size"),
        "no layout": ([v.boi, *b"1*1", c, v.eoi], "image without a size"),
        "zero": ([v.boi, *b"0*0", v.img, v.eoi], "image without a size"),
        "text inside": ([v.boi, *b"1*1", v.img, 65, v.eoi], "image with ragged rows"),
        "stray": ([c, v.eol, v.eoi], "image tokens outside an image"),
    }


@pytest.mark.parametrize(
    "name",
    ["cut off", "ragged", "too short", "no size", "no layout", "zero", "text inside", "stray"],
)
def test_a_broken_image_is_kept_and_named(byte_tokenizer: TextTokenizer, name: str) -> None:
    v = byte_tokenizer.vocabulary
    ids, reason = broken_images(v)[name]
    document = deserialize([v.bos, *b"a", *ids, v.ess, *b"b", v.eos], byte_tokenizer)
    special = Special("<|extra_101|>")
    assert document.parts == [Text("a"), Broken(tuple(ids), reason), special, Text("b")]
    assert document.problems == [reason]
    with pytest.raises(DataError, match=f"broken part: {reason}"):
        serialize(document, byte_tokenizer)


def test_an_image_begun_inside_another_is_read(byte_tokenizer: TextTokenizer) -> None:
    v = byte_tokenizer.vocabulary
    good = image_tokens([[1]], byte_tokenizer)
    document = deserialize([v.boi, *b"9*9", v.img, *good], byte_tokenizer)
    assert document.problems == ["image without an end"]
    assert document.parts[1] == Image(np.array([[1]]))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[1, 2], [3]], "different lengths|shape"),
        ([[]], r"shape \[1, 0\]"),
        ([1, 2], r"shape \[2\]"),
        ([[0.5]], "float64"),
        ([[1000]], "code 1000 lies outside the codebook of 1000"),
        ([[-1]], "code -1 lies outside"),
    ],
)
def test_bad_codes_are_named(byte_tokenizer: TextTokenizer, codes: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        image_tokens(codes, byte_tokenizer)


def test_an_error_names_the_document(byte_tokenizer: TextTokenizer) -> None:
    document = Document([Image(np.array([[5000]]))], source="photos", id="cat-7")
    with pytest.raises(DataError, match=r"'cat-7' of source 'photos': code 5000"):
        serialize(document, byte_tokenizer)


def test_layout_specials_belong_to_images(byte_tokenizer: TextTokenizer) -> None:
    for token in ("<|image start|>", "<|extra_200|>", "<|visual token 000001|>"):
        with pytest.raises(DataError, match="give the image as codes"):
            join_parts([Special(token)], byte_tokenizer)
    with pytest.raises(DataError, match="is no special token"):
        join_parts([Special("<|extra_205|>")], byte_tokenizer)


def test_ids_outside_the_vocabulary_are_refused(byte_tokenizer: TextTokenizer) -> None:
    with pytest.raises(TokenizerError, match="lies outside the vocabulary"):
        deserialize([0, byte_tokenizer.vocabulary.size], byte_tokenizer)


def test_modality_of_nothing(byte_tokenizer: TextTokenizer) -> None:
    assert modality_of([], vocabulary=byte_tokenizer.vocabulary).shape == (0,)
