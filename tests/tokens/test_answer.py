"""Generated documents as answers: the form as it should be, and everything else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu35.tokens.answer import (
    BOC,
    BOG,
    BSS,
    EOC,
    EOG,
    EOS,
    ESS,
    AnswerImage,
    AnswerPart,
    AnswerText,
    read_answer,
)
from emu35.tokens.document import Broken, Document, Image, Part, Special, Text
from emu35.tokens.serialize import join_parts, split_parts
from emu35.tokens.text import TextTokenizer


def grid(number: int) -> np.ndarray:
    return np.array([[number, 0], [1, 2]])


def image(number: int) -> Image:
    return Image(grid(number))


def document(*parts: Part | str) -> Document:
    """Strings that are marks become specials, other strings text."""
    marks = {BOG, EOG, BOC, EOC, BSS, ESS, EOS, "<|endoftext|>"}

    def part(item: Part | str) -> Part:
        if not isinstance(item, str):
            return item
        return Special(item) if item in marks else Text(item)

    return Document([part(item) for item in parts])


def test_marks_are_the_released_names():
    assert (BOG, EOG) == ("<|extra_60|>", "<|extra_61|>")
    assert (BOC, EOC) == ("<|extra_50|>", "<|extra_51|>")
    assert (BSS, ESS, EOS) == ("<|extra_100|>", "<|extra_101|>", "<|extra_204|>")


def test_an_answer_as_it_should_be():
    answer = read_answer(
        document(
            *(BOG, "plan", EOG, "first ", BOC, "a cat", EOC, image(1)),
            *("then\n", BOC, "a dog", EOC, image(2), image(3), ESS, EOS),
        )
    )
    assert answer.thought == "plan"
    assert answer.parts == [
        AnswerText("first "),
        AnswerImage(grid(1), thought="a cat"),
        AnswerText("then\n"),
        AnswerImage(grid(2), thought="a dog"),
        AnswerImage(grid(3), thought=None),
    ]
    assert answer.problems == []
    assert answer.beyond == []
    assert answer.text == "first\n\nthen"
    assert len(answer.images) == 3


def test_captions_are_the_texts_around_the_images():
    def captions(*parts: Part | str) -> list[str]:
        return read_answer(document(*parts)).captions

    assert captions(BOG, "plan", EOG, " one ", BOC, "thought", EOC, image(1), image(2), "end") == [
        "one",
        "",
        "end",
    ]
    assert captions(image(1), ESS, "beyond") == ["", ""]
    assert captions("words") == ["words"]
    assert captions() == [""]


def test_plain_text_and_nothing():
    assert read_answer(document("hi")).parts == [AnswerText("hi")]
    empty = read_answer(Document([]))
    assert (empty.thought, empty.parts, empty.problems) == (None, [], [])


def test_ids_from_the_tokenizer_read_back(byte_tokenizer: TextTokenizer):
    made = document(BOG, "plan", EOG, "hi", BOC, "cat", EOC, image(7), "bye", ESS, EOS)
    ids = join_parts(made.parts, byte_tokenizer)
    answer = read_answer(Document(split_parts(ids, byte_tokenizer)))
    assert answer == read_answer(made)
    assert answer.parts[1] == AnswerImage(grid(7), thought="cat")


@pytest.mark.parametrize(
    ("parts", "thought", "expected", "problem"),
    [
        ([BOG, "cut off"], "cut off", [], "a global chain of thought has no end <|extra_61|>"),
        (
            [BOG, "plan", image(1)],
            "plan",
            [AnswerImage(grid(1))],
            "a global chain of thought has no end <|extra_61|>",
        ),
        (
            [BOC, "a cat", image(1)],
            None,
            [AnswerImage(grid(1), thought="a cat")],
            "a chain of thought of an image has no end <|extra_51|>",
        ),
        (
            [BOC, "a cat", EOG, image(1)],
            None,
            [AnswerImage(grid(1), thought="a cat")],
            "a chain of thought of an image has no end <|extra_51|> but <|extra_61|>",
        ),
        (
            ["hi", BOC, "a cat", EOC, EOS],
            None,
            [AnswerText("hi"), AnswerText("a cat")],
            "a chain of thought of an image, but no image; it stands as text",
        ),
        (
            [BOC, "a", EOC, BOC, "b", EOC, image(1)],
            None,
            [AnswerImage(grid(1), thought="a\n\nb")],
            "a second chain of thought of an image in the same place; joined to the first",
        ),
        (
            [BOC, "a", EOC, "so:", image(1)],
            None,
            [AnswerText("so:"), AnswerImage(grid(1), thought="a")],
            "text between an image and its chain of thought",
        ),
        (
            ["hi", BOG, "late", EOG],
            "late",
            [AnswerText("hi")],
            "the global chain of thought is not at the beginning",
        ),
        (["a", EOG, "b"], None, [AnswerText("a"), AnswerText("b")], "stray <|extra_61|> in the"),
        (
            [BSS, *["<|endoftext|>"] * 312, "a"],
            None,
            [AnswerText("a")],
            "stray <|endoftext|> in the answer (312 times)",
        ),
    ],
)
def test_a_broken_form_is_named_and_kept(
    parts: list[Part | str], thought: str | None, expected: list[AnswerPart], problem: str
):
    answer = read_answer(document(*parts))
    assert answer.thought == thought
    assert answer.parts == expected
    assert any(line.startswith(problem) for line in answer.problems), answer.problems


def test_the_thought_of_a_broken_image_does_not_move_to_the_next():
    broken = Broken((1, 2), "image with ragged rows")
    answer = read_answer(document(BOC, "a cat", EOC, broken, BOC, "a dog", EOC, image(2)))
    assert answer.parts == [AnswerText("a cat"), AnswerImage(grid(2), thought="a dog")]
    assert "image with ragged rows" in answer.problems


def test_white_space_before_an_image_is_no_problem():
    answer = read_answer(document(BOG, "p", EOG, "\n", BOC, "a", EOC, "\n", image(1)))
    assert answer.problems == []
    assert answer.images[0].thought == "a"


@pytest.mark.parametrize("end", [ESS, EOS])
def test_the_answer_stops_at_its_end(end: str):
    answer = read_answer(document("a", end, EOS, "<|endoftext|>", "more", BOG, image(2)))
    assert answer.parts == [AnswerText("a")]
    assert answer.beyond == [AnswerText("more"), AnswerImage(grid(2))]
    assert answer.problems == ["after the end of the answer (texts: 1, images: 1)"]
    assert read_answer(document("a", end, EOS, "<|endoftext|>")).problems == []


kinds = st.sampled_from([BOG, EOG, BOC, EOC, BSS, ESS, EOS, "<|endoftext|>", "text", "image", "?"])


@settings(max_examples=500, deadline=None)
@given(st.lists(kinds, max_size=24))
def test_no_text_and_no_image_is_ever_lost(order: list[str]):
    parts: list[Part] = []
    for number, kind in enumerate(order):
        if kind == "text":
            parts.append(Text(f"<{number}>"))
        elif kind == "image":
            parts.append(image(number))
        elif kind == "?":
            parts.append(Broken((number,), f"reason {number}"))
        else:
            parts.append(Special(kind))
    answer = read_answer(Document(parts))
    found = answer.parts + answer.beyond
    images = [part for part in found if isinstance(part, AnswerImage)]
    assert [part.codes_HW[0, 0] for part in images] == [
        number for number, kind in enumerate(order) if kind == "image"
    ]
    texts = [part.text for part in found if isinstance(part, AnswerText)]
    every = "".join([answer.thought or "", *texts, *(part.thought or "" for part in images)])
    for number, kind in enumerate(order):
        if kind == "text":
            assert every.count(f"<{number}>") == 1
    assert len(every.replace("\n\n", "")) == sum(
        len(f"<{number}>") for number, kind in enumerate(order) if kind == "text"
    )
    assert {f"reason {n}" for n, kind in enumerate(order) if kind == "?"} <= set(answer.problems)
    assert all(isinstance(part, AnswerImage) or part.text for part in found)


@given(st.lists(kinds, max_size=16))
def test_an_answer_without_problems_has_the_form(order: list[str]):
    """No problem is named only where every mark has its partner in the right place."""
    parts: list[Part] = []
    for number, kind in enumerate(order):
        if kind == "?":
            continue
        parts.append(
            Text(f"<{number}>")
            if kind == "text"
            else image(number)
            if kind == "image"
            else Special(kind)
        )
    if read_answer(Document(parts)).problems:
        return
    tokens = [part.token for part in parts if isinstance(part, Special)]
    ends = [at for at, token in enumerate(tokens) if token in (ESS, EOS)]
    inside = tokens[: ends[0]] if ends else tokens
    assert inside.count(BOG) == inside.count(EOG) <= 1
    assert inside.count(BOC) == inside.count(EOC)
    assert not {BSS, "<|endoftext|>"} & set(inside)
