"""``emu35 tokens encode`` and ``decode``: what a user types in, what comes out."""

import json
from typing import Any

import pytest

from emu35.errors import DataError
from emu35.tokens.jsonl import decode_lines, encode_lines
from emu35.tokens.serialize import image_tokens
from emu35.tokens.text import TextTokenizer


def encode(tokenizer: TextTokenizer, record: object, *, allow_special: bool = False) -> list[int]:
    lines = [json.dumps(record)]
    (answer,) = encode_lines(lines, tokenizer=tokenizer, allow_special=allow_special)
    return json.loads(answer)["ids"]


def decode(tokenizer: TextTokenizer, ids: list[int]) -> dict[str, Any]:
    (answer,) = decode_lines([json.dumps({"ids": ids})], tokenizer=tokenizer)
    return json.loads(answer)


def test_text_becomes_ids_and_nothing_more(byte_tokenizer: TextTokenizer) -> None:
    assert encode(byte_tokenizer, {"text": "hi"}) == [*b"hi"]
    assert decode(byte_tokenizer, [*b"hi"]) == {"text": "hi"}


@pytest.mark.golden
def test_golden_samples_pass_through_the_command(
    released: TextTokenizer, golden_tokenizer: dict[str, Any], golden_pipeline: dict[str, Any]
) -> None:
    for sample in golden_tokenizer["samples"]:
        assert encode(released, {"text": sample["text"]}) == sample["ids"]
        assert decode(released, sample["ids"]) == {"text": sample["decoded"]}
    golden = golden_pipeline["image_grid"]
    assert encode(released, {"text": golden["string"]}, allow_special=True) == golden["ids"]
    assert encode(released, {"parts": [{"codes": golden["grid"]}], "frame": False}) == golden["ids"]
    assert decode(released, golden["ids"]) == {
        "text": golden["string"],
        "parts": [{"codes": golden["grid"]}],
        "frame": False,
    }


def test_a_document_round_trips(byte_tokenizer: TextTokenizer) -> None:
    v = byte_tokenizer.vocabulary
    parts = [
        {"text": "a <|image start|> b"},
        {"codes": [[5, 9], [2, 7]]},
        {"special": "<|extra_100|>"},
        {"text": "end"},
    ]
    ids = encode(byte_tokenizer, {"id": "x", "parts": parts})
    assert ids[0] == v.bos
    assert ids[-1] == v.eos
    assert ids.count(v.boi) == 1
    answer = decode(byte_tokenizer, ids)
    assert answer["parts"] == parts
    assert "frame" not in answer
    assert encode(byte_tokenizer, answer) == ids


@pytest.mark.parametrize("framed", [True, False])
def test_decoded_text_gives_the_ids_back_when_specials_are_allowed(
    byte_tokenizer: TextTokenizer, framed: bool
) -> None:
    record = {"parts": [{"text": "a"}, {"codes": [[1, 2]]}], "frame": framed}
    ids = encode(byte_tokenizer, record)
    text = decode(byte_tokenizer, ids)["text"]
    assert encode(byte_tokenizer, {"text": text}, allow_special=True) == ids


def test_specials_inside_text_only_when_allowed(byte_tokenizer: TextTokenizer) -> None:
    v = byte_tokenizer.vocabulary
    for record in ({"text": "<|image start|>"}, {"parts": [{"text": "<|image start|>"}]}):
        assert v.boi not in encode(byte_tokenizer, record)
        assert v.boi in encode(byte_tokenizer, record, allow_special=True)


def test_a_broken_image_is_named_and_round_trips(byte_tokenizer: TextTokenizer) -> None:
    ids = image_tokens([[1, 2], [3, 4]], byte_tokenizer)[:-2]
    answer = decode(byte_tokenizer, ids)
    assert answer["problems"] == ["image without an end"]
    assert encode(byte_tokenizer, answer) == ids


def test_lone_surrogates_in_json_do_no_harm(byte_tokenizer: TextTokenizer) -> None:
    (answer,) = encode_lines(['{"text": "a\\ud800b"}'], tokenizer=byte_tokenizer)
    assert decode(byte_tokenizer, json.loads(answer)["ids"]) == {"text": "a\ufffdb"}


def test_blank_lines_are_skipped_but_counted(byte_tokenizer: TextTokenizer) -> None:
    lines = ['{"text": "a"}\n', "\n", '{"text": "b"}\n', "oops\n"]
    answers = encode_lines(lines, tokenizer=byte_tokenizer)
    assert next(answers) == '{"ids": [97]}'
    assert next(answers) == '{"ids": [98]}'
    with pytest.raises(DataError, match=r"^line 4 is not JSON"):
        next(answers)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("3", "line 1 is no JSON object"),
        ("{}", "found no key; a line is"),
        ('{"txt": "a"}', r'found keys \["txt"\]; a line is'),
        ('{"text": 3}', '"text" is 3; it must be a string'),
        ('{"parts": {}}', '"parts" is {}; it must be a list'),
        ('{"parts": [3]}', "part 0 is 3; a part has exactly one"),
        ('{"parts": [{}]}', "part 0 has no key; a part has exactly one"),
        ('{"parts": [{"text": "a", "codes": []}]}', "part 0 has keys"),
        ('{"parts": [{"image": 1}]}', "part 0 has keys"),
        ('{"parts": [{"codes": [[1], [2, 3]]}]}', "rows of different lengths"),
        ('{"parts": [{"codes": []}]}', "at least 1 x 1"),
        ('{"parts": [{"codes": [[]]}]}', "at least 1 x 1"),
        ('{"parts": [{"codes": [[1.5]]}]}', "holds 1.5; it must hold whole numbers"),
        ('{"parts": [{"codes": [[true]]}]}', "holds true; it must hold whole numbers"),
        ('{"parts": [{"codes": [[1000]]}]}', "code 1000 lies outside the codebook"),
        ('{"parts": [{"codes": [[99999999999999999999]]}]}', "it must hold whole numbers"),
        ('{"parts": [{"special": "<|image start|>"}]}', "give the image as codes"),
        ('{"parts": [{"ids": [-1]}]}', "id -1 lies outside the vocabulary"),
        ('{"parts": [], "frame": 1}', '"frame" is 1; it must be true or false'),
    ],
)
def test_bad_lines_to_encode(byte_tokenizer: TextTokenizer, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(encode_lines([line], tokenizer=byte_tokenizer))
    assert str(caught.value).startswith("line 1")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', r'found keys \["text"\]; a line is {"ids"'),
        ('{"ids": "a"}', "it must be a list"),
        ('{"ids": ["a"]}', "it must hold whole numbers"),
        ('{"ids": [1467]}', r"id 1467 lies outside the vocabulary of 1467 ids"),
    ],
)
def test_bad_lines_to_decode(byte_tokenizer: TextTokenizer, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(decode_lines([line], tokenizer=byte_tokenizer))
    assert str(caught.value).startswith("line 1")
