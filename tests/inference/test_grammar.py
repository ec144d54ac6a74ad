"""The decoding grammar: no image can come out ragged, whatever the model prefers."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu35.errors import DataError
from emu35.inference.grammar import (
    Grammar,
    GrammarOptions,
    GridSize,
    NextKind,
    SizeIds,
    State,
)
from emu35.tokens.document import Image
from emu35.tokens.serialize import deserialize
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


def test_every_state_and_every_way_between_them() -> None:
    machine = grammar(size=GridSize(height=2, width=2))
    seen = [machine.state]
    for token in [V.boi, *b"2*2", V.img, V.visual(1), V.visual(2), V.eol, V.visual(3), V.visual(4)]:
        machine.accept(token)
        seen.append(machine.state)
    machine.accept(V.eoi)
    seen.append(machine.state)
    header, row, end = State.HEADER, State.ROW, State.ROW_END
    assert seen == [State.TEXT, *[header] * 4, row, row, end, row, row, end, State.TEXT]
    assert machine.images == 1


ILLEGAL = {
    "text": ([], [V.eol, V.img, V.eoi, V.visual(0)]),
    "header": ([V.boi], [V.img, ord("3"), ord("*"), V.visual(0), V.eoi, V.boi, V.eos]),
    "row": ([V.boi, *b"2*1", V.img], [V.eol, V.eoi, V.boi, V.eos, ord("a"), V.visual_start - 1]),
    "row end": ([V.boi, *b"2*1", V.img, V.visual(0)], [V.eoi, V.visual(0), V.boi, V.eos]),
    "image end": (
        [V.boi, *b"2*1", V.img, V.visual(0), V.eol, V.visual(0)],
        [V.eol, V.visual(0), V.eos],
    ),
}


@pytest.mark.parametrize("where", ILLEGAL)
def test_what_is_not_legal_is_neither_offered_nor_accepted(where: str) -> None:
    before, illegal = ILLEGAL[where]
    for token in illegal:
        machine = grammar(size=GridSize(height=2, width=1))
        for earlier in before:
            machine.accept(earlier)
        assert token not in machine.next()
        with pytest.raises(DataError, match=f"token {token} is not legal in the state"):
            machine.accept(token)


def test_text_alone_never_opens_an_image() -> None:
    legal = grammar(images=False).next()
    assert not {V.boi, V.img, V.eoi, V.eol, V.visual(0)} & {
        id for start, end in legal.ranges for id in range(start, end)
    }
    assert V.eos in legal


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_is_sampled_parses_back_with_every_image_whole(data: st.DataObject) -> None:
    """Any choice among the legal tokens, in any number of tokens."""
    sides = st.integers(1, 12)
    fixed = data.draw(st.none() | st.builds(lambda h, w: GridSize(height=h, width=w), sides, sides))
    options = {
        "size": fixed,
        "same_size": data.draw(st.booleans()),
        "min_digits": data.draw(st.sampled_from([1, 2])),
        "images": data.draw(st.sampled_from([True, True, True, False])),
    }
    machine = grammar(**options)
    room = data.draw(st.integers(1, 600))
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    ids: list[int] = []
    shapes: list[tuple[int, int]] = []
    while len(ids) < room:
        step = machine.next(room=room - len(ids))
        if step.kind is NextKind.TEXT and V.boi in step and rng.random() < 0.3:
            token = V.boi
        else:
            # Text ids are drawn from anywhere, odd specials and halves of characters included.
            start, end = rng.choice(step.ranges)
            token = rng.randrange(start, end)
        machine.accept(token)
        ids.append(token)
        if token == V.eoi:
            assert machine.size is not None or not options["same_size"]
    document = deserialize(ids, TOKENIZER)
    assert document.problems == []
    shapes = [part.codes_HW.shape for part in document.parts if isinstance(part, Image)]
    assert len(shapes) == ids.count(V.boi) == ids.count(V.eoi) == machine.images
    if fixed:
        assert set(shapes) <= {(fixed.height, fixed.width)}
    elif options["same_size"]:
        assert len(set(shapes)) <= 1


def test_an_image_is_opened_only_where_it_fits() -> None:
    size = GridSize(height=3, width=4)
    machine = grammar(size=size)
    assert V.boi in machine.next(room=size.image_tokens)
    assert V.boi not in machine.next(room=size.image_tokens - 1)


def test_a_free_size_is_bounded_by_what_remains() -> None:
    """Behind BOI and "2", with room for an image of 20 * 10 codes and not one more row."""
    room = GridSize(height=20, width=10).image_tokens - 2
    machine = grammar()
    for token in [V.boi, ord("2")]:
        machine.accept(token)
    assert TOKENIZER.decode(sorted(machine.next(room=room).ids)) == "0"
