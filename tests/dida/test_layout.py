"""Noisy copies behind a row: what they hold, what they see, and how many there are."""

import pytest
import torch
from dida_rows import VOCABULARY, picture, row
from hypothesis import given, settings
from hypothesis import strategies as st

from emu35.data.batch import Batch
from emu35.dida.layout import NoisyCopies, find_pictures
from emu35.errors import DataError
from emu35.model.mask import AttentionMask
from emu35.tokens.document import Special
from emu35.tokens.serialize import Modality

BSS, ESS = (VOCABULARY.special_string(id) for id in (VOCABULARY.bss, VOCABULARY.ess))
IMG, EOI, EOL = VOCABULARY.img, VOCABULARY.eoi, VOCABULARY.eol


def copied(batch: Batch, *, room: int, per_document: int = 0) -> tuple[Batch, tuple[int, int]]:
    """The batch with copies; how many pictures there are and how many got one."""
    copies = NoisyCopies(vocabulary=VOCABULARY, room=room, per_document=per_document)
    wide = copies(batch)
    tally = copies.tally(wide)
    return wide, (int(tally["pictures"]), int(tally["pictures_copied"]))


sizes = st.tuples(st.integers(1, 3), st.integers(1, 4))
documents = st.lists(
    st.lists(st.one_of(st.text("ab ", min_size=1, max_size=5), sizes), min_size=1, max_size=5),
    min_size=1,
    max_size=3,
)


def build(drawn: list[list[str | tuple[int, int]]], *, columns: int) -> Batch:
    return row(
        [
            [
                part if isinstance(part, str) else picture(*part, seed=at)
                for at, part in enumerate(d)
            ]
            for d in drawn
        ],
        columns=columns,
    )


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(13, 60), st.integers(0, 2))
def test_every_row_of_a_copy_sees_what_came_before_its_picture_and_the_copy(
    drawn: list[list[str | tuple[int, int]]], room: int, per_document: int
) -> None:
    """Read token by token, against the mask's matrix."""
    columns = 400
    batch = build(drawn, columns=columns)
    wide, (counted, made_copies) = copied(batch, room=room, per_document=per_document)
    assert wide.intervals is not None
    assert wide.noisy is not None
    seen = AttentionMask.from_intervals(wide.intervals).dense(columns + room)[0]
    tokens, start = wide.tokens[0].tolist(), wide.document_start[0].tolist()
    noisy, positions = wide.noisy[0].tolist(), wide.positions[0].tolist()
    assert torch.equal(wide.tokens[:, :columns], batch.tokens)
    for at in range(columns):
        own = set(range(start[at], at + 1)) if start[at] < columns else set()
        assert set(seen[at].nonzero().flatten().tolist()) == own

    pictures = list(find_pictures(batch.tokens[0], batch.document_start[0], VOCABULARY))
    whole = sum(isinstance(part, tuple) for document in drawn for part in document)
    assert len(pictures) == whole == counted
    made = sorted(set(noisy) - {-1})
    assert made == list(range(made_copies))
    first = columns
    for number in made:
        rows = [at for at, other in enumerate(noisy) if other == number]
        assert rows == list(range(first, first + len(rows)))
        first += len(rows)
        original = next(
            p
            for p in pictures
            if p.document == start[rows[0]] and p.img - p.document == positions[rows[0]]
        )
        clean = range(original.img, original.eoi)
        assert [tokens[at] for at in rows] == [tokens[at] for at in clean]
        assert tokens[rows[0]] == IMG
        assert [positions[at] for at in rows] == [positions[at] for at in clean]
        visible = {*range(original.document, original.img), *rows}
        for at, other in zip(rows, clean, strict=True):
            assert set(seen[at].nonzero().flatten().tolist()) == visible
            code = tokens[other + 1]
            assert wide.label_valid[0, at] == VOCABULARY.is_visual(code)
            assert wide.labels[0, at] == code
    for at in range(first, columns + room):
        assert not seen[at].any()
        assert not wide.label_valid[0, at]
        assert tokens[at] == VOCABULARY.pad


def test_pictures_without_room_are_counted_and_smaller_ones_behind_them_still_fit() -> None:
    batch = row([["a", picture(3, 4)], [picture(1, 2), "b", picture(1, 1)]], columns=80)
    wide, counts = copied(batch, room=6)
    assert counts == (3, 2)
    assert wide.tokens[0, 80:].tolist()[0] == IMG
    assert (wide.noisy == 0).sum() == 3  # IMG and two codes
    assert (wide.noisy == 1).sum() == 2


def test_a_document_gets_at_most_as_many_copies_as_asked_for() -> None:
    batch = row([[picture(1, 1), picture(1, 2), picture(2, 2)], [picture(1, 1)]], columns=80)
    wide, counts = copied(batch, room=60, per_document=2)
    assert wide.noisy is not None
    assert counts == (4, 3)
    copied_of = [
        {int(wide.document_start[0, at]) for at in range(80, 140) if wide.noisy[0, at] == number}
        for number in range(3)
    ]
    assert [len(documents) for documents in copied_of] == [1, 1, 1]
    assert copied_of[0] == copied_of[1] != copied_of[2]


def test_every_picture_of_a_document_gets_its_turn() -> None:
    """Which one is drawn from the row's number, the same every time."""
    sizes = [(1, 1), (1, 2), (2, 2)]
    found = []
    for sample in range(60):
        batch = row([[picture(*size) for size in sizes]], columns=60, sample=sample)
        wide, _ = copied(batch, room=30, per_document=1)
        again, _ = copied(batch, room=30, per_document=1)
        assert torch.equal(wide.tokens, again.tokens)
        found.append(int((wide.noisy == 0).sum()))
    # IMG and the codes, of the last one a row end as well; 20 of each, give or take four
    # standard deviations.
    assert set(found) == {2, 3, 6}
    assert all(abs(found.count(length) - 20) < 15 for length in (2, 3, 6))


def test_pictures_of_questions_get_no_copy_where_responses_are_learned() -> None:
    """Two turns: a picture asked about and one drawn in each, and a document without turns."""
    turn = [picture(1, 2), "q", Special(BSS), "a", picture(2, 2), Special(ESS)]
    batch = row([[*turn, *turn], [picture(1, 1)]], columns=140)
    copies = NoisyCopies(vocabulary=VOCABULARY, room=80, answers_only=True)
    wide = copies(batch)
    assert copies.tally(wide) == {"pictures": 2.0, "pictures_copied": 2.0}
    assert [int((wide.noisy == number).sum()) for number in range(2)] == [6, 6]
    everything = NoisyCopies(vocabulary=VOCABULARY, room=80)
    assert everything.tally(everything(batch))["pictures"] == 5.0


def test_a_room_that_no_picture_fits_is_refused_with_the_length_that_would_do() -> None:
    copies = NoisyCopies(vocabulary=VOCABULARY, room=5)
    with pytest.raises(DataError, match="the smallest of them needs 6"):
        copies.tally(copies(row([[picture(2, 2), picture(3, 3)]], columns=60)))


def test_a_picture_that_is_cut_off_has_no_copy() -> None:
    batch = row([["x", picture(2, 2)]], columns=40)
    batch.tokens[batch.tokens == EOI] = VOCABULARY.pad
    assert copied(batch, room=20)[1] == (0, 0)


def test_row_ends_stay_in_the_copy_and_are_never_asked_for() -> None:
    batch = row([[picture(2, 3)]], columns=30)
    wide, _ = copied(batch, room=8)
    copy = wide.tokens[0, 30:].tolist()
    assert copy[0] == IMG
    assert copy[4] == EOL
    assert wide.label_valid[0, 30:].tolist() == [True] * 3 + [False] + [True] * 3 + [False]
    assert set(wide.label_modality[0, 30:][wide.label_valid[0, 30:]].tolist()) == {Modality.VISUAL}
