"""Lines that are read against lines that stand there."""

import pytest

from emu35.rewards.reader import Line
from emu35.stages.tokenizer_eval.reading import LineFigures, Reference, compare, references
from emu35.stages.tokenizer_eval.summary import sizes_of

TOP, BOTTOM = (0.1, 0.1, 0.9, 0.2), (0.1, 0.6, 0.9, 0.9)


def figures(read: list[Line], *, wanted: list[Reference]) -> list[LineFigures]:
    return compare(wanted, found=read, picture=0)


def test_lines_are_compared_where_they_stand() -> None:
    wanted = [Reference(text="Red fox", box=TOP), Reference(text="BLUE SKY", box=BOTTOM)]
    found = figures(
        [
            Line(text="blue", box=(0.1, 0.6, 0.4, 0.9)),
            Line(text="sky", box=(0.5, 0.62, 0.9, 0.92)),
            Line(text="red box", box=(0.08, 0.08, 0.92, 0.22)),
        ],
        wanted=wanted,
    )
    assert [line.read for line in found] == ["red box", "blue sky"]
    assert [(line.right, line.words) for line in found] == [(1, 2), (2, 2)]
    # One of six letters differs; case and the gap between words do not count.
    assert [line.distance for line in found] == pytest.approx([1 / 6, 0])
    assert [line.height for line in found] == pytest.approx([0.1, 0.3])


def test_what_is_not_read_counts_in_full() -> None:
    (line,) = figures([], wanted=[Reference(text="lemon", box=TOP)])
    assert (line.read, line.right, line.words, line.distance) == ("", 0, 1, 1.0)


def test_words_count_in_their_order() -> None:
    wanted = [Reference(text="one two three four", box=TOP)]
    (line,) = figures([Line(text="four one three", box=TOP)], wanted=wanted)
    assert (line.right, line.words) == (2, 4)


def test_a_line_elsewhere_belongs_to_nobody() -> None:
    (line,) = figures([Line(text="lemon", box=BOTTOM)], wanted=[Reference(text="lemon", box=TOP)])
    assert line.read == ""


def test_texts_from_a_file_take_the_place_of_what_is_like_them() -> None:
    original = [Line(text="0RANGE jam", box=TOP), Line(text="butter", box=BOTTOM)]
    found = references(["butter", "orange jam", " ", "unseen"], original=original)
    assert [(line.text, line.box) for line in found] == [
        ("butter", BOTTOM),
        ("orange jam", TOP),
        ("unseen", None),
    ]
    # What has no place is found by likeness, wherever it is read.
    read = figures([Line(text="unseem", box=(0.0, 0.3, 0.3, 0.4))], wanted=found)
    assert [line.read for line in read] == ["", "", "unseem"]
    assert read[2].height is None


def test_without_a_file_the_original_says_what_stands_there() -> None:
    original = [Line(text="tea", box=TOP), Line(text=" ", box=BOTTOM)]
    assert references(None, original=original) == [Reference(text="tea", box=TOP)]


@pytest.mark.parametrize(
    ("height", "key"),
    [(0.0, "0_0.05"), (0.049, "0_0.05"), (0.05, "0.05_0.1"), (0.3, "0.2_1"), (1.0, "0.2_1")],
)
def test_every_height_is_in_one_range(height: float, key: str) -> None:
    ranges = sizes_of([0.05, 0.1, 0.2])
    assert [sizes.key for sizes in ranges if sizes.holds(height)] == [key]
    assert [sizes.key for sizes in ranges if sizes.holds(None)] == ["unknown"]
