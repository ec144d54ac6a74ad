"""Events of a sequence are its document, however the tokens are cut."""

import itertools
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from emu35.config import TokenizerConfig, TokenizerKind
from emu35.inference.grammar import GridSize
from emu35.inference.progress import (
    End,
    Event,
    ImageBegun,
    ImageDone,
    ImageProgress,
    Problem,
    Progress,
    TextPiece,
    ThoughtPiece,
)
from emu35.tokens.answer import read_answer
from emu35.tokens.serialize import deserialize, image_tokens
from emu35.tokens.text import TextTokenizer, build_text_tokenizer

TOKENIZER = build_text_tokenizer(TokenizerConfig(kind=TokenizerKind.bytes, codebook_size=8))
V = TOKENIZER.vocabulary


def events_of(
    ids: Sequence[int], *, tokenizer: TextTokenizer = TOKENIZER, cuts: Sequence[int] = ()
) -> list[Event]:
    """The events of ``ids`` fed in pieces that end at ``cuts``."""
    progress, events = Progress(tokenizer), []
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    for begin, end in itertools.pairwise(edges):
        events += progress.feed_ids(ids[begin:end])
    return events + progress.finish()


def text_of(events: Sequence[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, TextPiece | ThoughtPiece))


def image(height: int, width: int, *, first: int = 0) -> list[int]:
    codes = (first + np.arange(height * width)).reshape(height, width) % V.codebook_size
    return image_tokens(codes, TOKENIZER)


JOINT = "\n\n"
WORDS = st.text(st.characters(exclude_characters="\n"), max_size=4)
PIECES = st.one_of(
    WORDS.map(TOKENIZER.encode),
    st.binary(max_size=4)
    .filter(lambda b: b"\n" not in b)
    .map(list),  # UTF-8 that is broken, or goes on in the next piece
    st.builds(image, st.integers(1, 3), st.integers(1, 3), first=st.integers(0, 7)),
    st.sampled_from([[V.bog], [V.eog], [V.boc], [V.eoc], [V.ess], [V.pad], [V.eos]]),
    st.sampled_from([[V.eol], [V.img], [V.eoi]]),  # what the official decoder permits in text
)
ANY_IDS = st.lists(st.integers(0, V.size - 1), max_size=30)
LEGAL = st.lists(PIECES, max_size=8).map(lambda pieces: [id for piece in pieces for id in piece])
CUT_SHORT = st.builds(lambda ids, keep: ids[: keep % (len(ids) + 1)], LEGAL, st.integers(0, 60))
LAYOUT = st.lists(
    st.sampled_from([V.boi, V.eoi, V.img, V.eol, V.visual(0), *b"12*", V.bog, V.eos]), max_size=20
)


@settings(max_examples=300, deadline=None)
@given(ids=LEGAL | CUT_SHORT | ANY_IDS | LAYOUT, cuts=st.lists(st.integers(0, 60), max_size=8))
@example(ids=[*image(2, 2)[:-1]], cuts=[3])
@example(ids=[V.boi, *b"2*1", V.img, V.visual(0), V.eol, V.eol, V.eoi], cuts=[])
@example(ids=[0xC3, V.pad, 0xA9], cuts=[1, 2])
def test_all_events_together_are_the_document(ids: list[int], cuts: list[int]) -> None:
    events = events_of(ids, cuts=cuts)
    document = deserialize(ids, TOKENIZER)
    assert text_of(events) == "".join(document.texts)
    done = [event for event in events if isinstance(event, ImageDone)]
    assert [event.number for event in done] == list(range(len(document.images)))
    for event, codes_HW in zip(done, document.images, strict=True):
        assert np.array_equal(event.codes_HW, codes_HW)
    assert [e.reason for e in events if isinstance(e, Problem)] == document.problems
    assert [type(event) for event in events].count(End) == 1
    assert isinstance(events[-1], End)


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(PIECES, max_size=10), cuts=st.lists(st.integers(0, 60), max_size=8))
@example(pieces=[[V.bog], [65], [V.eoc], [66]], cuts=[])
@example(pieces=[[V.bog], [65], [V.eoi], [66]], cuts=[])
@example(pieces=[[V.boc], [65], [V.eoi], [66]], cuts=[])
@example(pieces=[[V.ess], [V.bog], [65]], cuts=[])
def test_thoughts_are_those_of_the_answer(pieces: list[list[int]], cuts: list[int]) -> None:
    ids = [id for piece in pieces for id in piece]
    events = events_of(ids, cuts=cuts)
    answer = read_answer(deserialize(ids, TOKENIZER))

    def thought(image: bool) -> str:
        return "".join(e.text for e in events if isinstance(e, ThoughtPiece) and e.image == image)

    # Where the form is broken the reader joins thoughts by empty lines and sets others as text.
    assert thought(False) == (answer.thought or "").replace(JOINT, "")
    drawn = "".join(image.thought or "" for image in answer.images).replace(JOINT, "")
    if not any("stands as text" in problem for problem in answer.problems):
        assert thought(True) == drawn
    else:
        assert len(thought(True)) >= len(drawn)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=12), cuts=st.lists(st.integers(0, 40), max_size=8))
def test_every_piece_of_text_can_be_printed(text: str, cuts: list[int]) -> None:
    """No piece holds a broken character, though a token may be one byte of four."""
    ids = TOKENIZER.encode(text)
    events = events_of(ids, cuts=cuts)
    assert text_of(events) == TOKENIZER.decode(ids)
    if "\ufffd" not in TOKENIZER.decode(ids):
        assert not any("\ufffd" in text_of([event]) for event in events)


@pytest.mark.golden
def test_byte_pairs_that_split_a_character(table) -> None:
    config = TokenizerConfig(kind=TokenizerKind.emu35, codebook_size=131072, table=str(table))
    released = build_text_tokenizer(config)
    text = "a \U0001f9a9 flamingo, \u6d77\u8fb9 \u0e17\u0e30\u0e40\u0e25"
    ids = released.encode(text)
    assert any("\ufffd" in released.decode([id]) for id in ids), "no token is half a character"
    progress = Progress(released)
    pieces = [event for id in ids for event in progress.feed_ids([id])] + progress.finish()
    assert text_of(pieces) == text
    assert not any("\ufffd" in text_of([piece]) for piece in pieces)


def test_a_picture_begins_grows_and_ends() -> None:
    ids = [*b"see ", *image(3, 2)]
    progress = Progress(TOKENIZER)
    events = [event for id in ids for event in progress.feed_ids([id])]
    after = [event for event in events if not isinstance(event, TextPiece)]
    begun, first, second, done = after
    assert begun == ImageBegun(number=0, size=GridSize(height=3, width=2))
    for rows, event in enumerate((first, second), start=1):
        assert isinstance(event, ImageProgress)
        assert (event.number, event.rows_done, event.rows) == (0, rows, 3)
        assert event.codes_HW.tolist() == [[0, 1], [2, 3]][:rows]
    assert isinstance(done, ImageDone)
    assert done.codes_HW.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_rows_that_were_shown_stay_as_they_were() -> None:
    """However late a consumer looks at them."""
    codes_HW = np.arange(900).reshape(300, 3) % V.codebook_size
    events = events_of(image_tokens(codes_HW, TOKENIZER))
    rows = [event for event in events if isinstance(event, ImageProgress)]
    (done,) = (event for event in events if isinstance(event, ImageDone))
    assert len(rows) == 299
    for event in rows:
        assert np.array_equal(event.codes_HW, codes_HW[: event.rows_done])
    done.codes_HW[:] = 0
    assert np.array_equal(rows[-1].codes_HW, codes_HW[:299])


def test_a_tall_picture_costs_what_its_codes_do() -> None:
    """All events kept; copies of all rows at each would be 8,000 * 8,000 / 2 codes, 256 MB."""
    ids = image(8000, 1)
    tracemalloc.start()
    try:
        events = events_of(ids, cuts=range(len(ids)))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(events) == 8000 + 2
    assert most < 16 * 2**20


def test_a_size_that_only_promises_rows_takes_no_memory() -> None:
    row = [V.visual(n % V.codebook_size) for n in range(1000)]
    ids = [V.boi, *TOKENIZER.encode("999999*1000"), V.img, *row, V.eol]
    tracemalloc.start()
    try:
        kinds = [type(event) for event in events_of(ids)]
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kinds == [ImageBegun, ImageProgress, Problem, End]
    assert most < 16 * 2**20


def test_thoughts_are_told_apart() -> None:
    ids = [V.bog, *b"plan", V.eog, *b"One.", V.boc, *b"draw", V.eoc, *image(1, 1), *b"Two.", V.ess]
    assert [event for event in events_of(ids) if not isinstance(event, ImageBegun | ImageDone)] == [
        ThoughtPiece(text="plan", image=False),
        TextPiece("One."),
        ThoughtPiece(text="draw", image=True),
        TextPiece("Two."),
        End(),
    ]


def test_a_picture_cut_off_is_a_problem_and_no_picture() -> None:
    ids = image(2, 2)[:-3]
    kinds = [type(event) for event in events_of(ids)]
    assert kinds == [ImageBegun, ImageProgress, Problem, End]
