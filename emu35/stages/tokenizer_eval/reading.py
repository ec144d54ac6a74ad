"""Text read off a reconstruction against what stood there, line by line.

Every line has a text and mostly a box. Lines that are read belong to the line whose box covers most
of them; lines of one box are one text. What cannot be placed (text files beside pictures have no
boxes, and a line may not be found in the original) is paired by likeness instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emu35.rewards.boxes import Box, area, shared
from emu35.rewards.reader import Line
from emu35.rewards.text_fidelity import Normal, edit_distance, likeness

COVERED = 0.3
"""Share of a line that is read which the box of its own line covers at least: readers draw boxes
about a third higher than the letters."""

ALIKE = 0.5
"""Likeness from which a line that is read may be one without a box."""

LETTERS = Normal(ignore_case=True, ignore_spaces=True)
WORDS = Normal(ignore_case=True, ignore_spaces=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A line that stands in a picture, its place unknown where ``box`` is None."""

    text: str
    box: Box | None = None

    @property
    def height(self) -> float | None:
        """As a share of the picture's."""
        return None if self.box is None else self.box[3] - self.box[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class LineFigures:
    """A line of picture ``picture``: what stood there, what was read; ``right`` of its ``words``
    in their order, and the edit distance over the longer text's length, in [0, 1]."""

    picture: int
    height: float | None
    wanted: str
    read: str
    words: int
    right: int
    distance: float


def references(truth: Sequence[str] | None, *, original: Sequence[Line]) -> list[Reference]:
    """What stands in a picture: the lines ``truth`` where they are known, each with the place of
    the line that is read off the original and most like it; else those lines themselves."""
    if truth is None:
        return [Reference(text=line.text, box=line.box) for line in original if _said(line.text)]
    wanted = [text for text in truth if _said(text)]
    pairs = _alike(wanted, [line.text for line in original])
    return [
        Reference(text=text, box=original[pairs[at]].box if at in pairs else None)
        for at, text in enumerate(wanted)
    ]


def compare(
    wanted: Sequence[Reference], *, found: Sequence[Line], picture: int
) -> list[LineFigures]:
    """Figures of every line of ``picture``, of which ``found`` was read."""
    return [
        _figures(reference, read=read, picture=picture)
        for reference, read in zip(wanted, _read_back(wanted, found=found), strict=True)
    ]


def truth_beside(path: Path) -> list[str] | None:
    """Lines of ``KEY.txt`` beside the picture ``path``, None if there is none.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
    """
    beside = path.with_suffix(".txt")
    return beside.read_text(encoding="utf-8").splitlines() if beside.is_file() else None


def _read_back(wanted: Sequence[Reference], *, found: Sequence[Line]) -> list[str]:
    texts: list[list[str]] = [[] for _ in wanted]
    spare: list[str] = []
    for line in found:
        covered = [
            shared(line.box, reference.box) if reference.box else 0.0 for reference in wanted
        ]
        best = max(covered, default=0.0)
        if best > 0 and best >= COVERED * area(line.box):
            texts[covered.index(best)].append(line.text)
        else:
            spare.append(line.text)
    unplaced = [at for at, reference in enumerate(wanted) if reference.box is None]
    pairs = _alike([wanted[at].text for at in unplaced], spare)
    for number, at in enumerate(unplaced):
        if number in pairs:
            texts[at].append(spare[pairs[number]])
    return [" ".join(parts) for parts in texts]


def _alike(wanted: Sequence[str], found: Sequence[str]) -> dict[int, int]:
    """Partners of likeness :data:`ALIKE` or more, the most alike first: index -> index."""
    scores = [
        (likeness(LETTERS(a), LETTERS(b)), row, column)
        for row, a in enumerate(wanted)
        for column, b in enumerate(found)
    ]
    pairs: dict[int, int] = {}
    for score, row, column in sorted(scores, key=lambda item: (-item[0], item[1], item[2])):
        if score >= ALIKE and row not in pairs and column not in pairs.values():
            pairs[row] = column
    return pairs


def _figures(reference: Reference, *, read: str, picture: int) -> LineFigures:
    a, b = LETTERS(reference.text), LETTERS(read)
    words = WORDS(reference.text).split()
    return LineFigures(
        picture=picture,
        height=reference.height,
        wanted=reference.text,
        read=read,
        words=len(words),
        right=_in_order(words, WORDS(read).split()),
        distance=edit_distance(a, b) / max(len(a), len(b)),
    )


def _in_order(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for j, right in enumerate(b, start=1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if left == right else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]


def _said(text: str) -> bool:
    """Whether anything is left of ``text`` in the form in which texts are compared."""
    return bool(LETTERS(text))
