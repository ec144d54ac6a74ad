"""The decoding grammar: no image can come out ragged, whatever the model prefers."""

import random

import pytest

from emu35.inference.grammar import Grammar, GrammarOptions, GridSize, NextKind, SizeIds
from emu35.tokens.text import ByteTokenizer
from emu35.tokens.vocabulary import Vocabulary

TOKENIZER = ByteTokenizer(vocabulary=Vocabulary(n_text=256, codebook_size=64))
V = TOKENIZER.vocabulary
SIZES = SizeIds.of(TOKENIZER)


def grammar(**options: object) -> Grammar:
    return Grammar(
        vocabulary=V,
        size_ids=SIZES,
        options=GrammarOptions(**options),  # type: ignore[arg-type]
    )


def walk(machine: Grammar, *, seed: int = 0) -> list[int]:
    """Accept random legal tokens until the image that is opened next has ended."""
    rng = random.Random(seed)
    ids: list[int] = []
    while not ids or ids[-1] != V.eoi:
        step = machine.next()
        match step.kind:
            case NextKind.TEXT:
                token = V.boi
            case NextKind.VISUAL:
                token = V.visual(rng.randrange(V.codebook_size))
            case _:
                token = rng.choice(step.ids)
        machine.accept(token)
        ids.append(token)
    return ids


def shape(ids: list[int]) -> tuple[int, int]:
    """Declared size of the image ``ids``, after checking the rows against it."""
    text = TOKENIZER.decode(ids[1 : ids.index(V.img)])
    height, width = map(int, text.split("*"))
    body = ids[ids.index(V.img) + 1 : -1]
    rows: list[list[int]] = [[]]
    for token in body:
        if token == V.eol:
            rows.append([])
        else:
            assert V.is_visual(token)
            rows[-1].append(token)
    assert [len(row) for row in rows] == [width] * height
    return height, width


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (5, 1), (2, 3), (8, 8), (55, 73)])
def test_forced_size_gives_exactly_that_grid(height: int, width: int) -> None:
    size = GridSize(height=height, width=width)
    ids = walk(grammar(size=size))
    assert shape(ids) == (height, width)
    assert len(ids) == size.image_tokens


@pytest.mark.parametrize("seed", range(20))
def test_free_size_has_two_digits_a_side_and_a_matching_grid(seed: int) -> None:
    height, width = shape(walk(grammar(), seed=seed))
    assert 10 <= height <= 99
    assert 10 <= width <= 99


def test_free_size_of_small_pictures_may_have_one_digit() -> None:
    shapes = [shape(walk(grammar(min_digits=1), seed=seed)) for seed in range(40)]
    assert any(height < 10 for height, _ in shapes)
    assert all(1 <= side <= 99 for pair in shapes for side in pair)


def test_free_size_choices_are_digits_then_star_then_image() -> None:
    machine = grammar()
    machine.accept(V.boi)
    choices: list[str] = []
    for char in "41*97":
        step = machine.next()
        choices.append(TOKENIZER.decode(sorted(step.ids)))
        machine.accept(ord(char))
    assert choices == ["123456789", "0123456789", "*", "123456789", "0123456789"]
    assert machine.next().ids == (V.img,)


def test_later_images_repeat_the_first_size_unless_told_otherwise() -> None:
    story, free = grammar(), grammar(same_size=False)
    first = shape(walk(story, seed=1))
    assert [shape(walk(story, seed=seed)) for seed in (2, 3)] == [first, first]
    assert len({shape(walk(free, seed=seed)) for seed in range(6)}) > 1


def test_an_opened_image_leaves_no_choice_before_the_first_code() -> None:
    machine = grammar(open_image=True, size=GridSize(height=2, width=3))
    forced: list[int] = []
    while machine.next().kind is NextKind.FORCED:
        forced += machine.next().ids
        machine.accept(forced[-1])
    assert forced == [V.boi, ord("2"), ord("*"), ord("3"), V.img]
    walk(machine)
    assert machine.next().kind is NextKind.TEXT


def test_only_images_feed_the_unconditional_stream() -> None:
    machine = grammar(size=GridSize(height=1, width=2))
    fed: list[int] = []
    for token in [ord("a"), V.boi, *b"1*2", V.img, V.visual(3), V.visual(4), V.eoi, ord("b")]:
        if machine.accept(token):
            fed.append(token)
    assert fed == [V.boi, *b"1*2", V.img, V.visual(3), V.visual(4), V.eoi]
