"""How much of a text was read: 1 - normalised edit distance, order of lines allowed for."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emu35.rewards.matching import best_pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class Normal:
    """The form in which texts are compared: Unicode NFKC (a full-width letter is a letter), and
    without case and white space where those are ignored."""

    ignore_case: bool = True
    ignore_spaces: bool = True

    def __call__(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", text)
        if self.ignore_case:
            text = text.casefold()
        return ("" if self.ignore_spaces else " ").join(text.split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest characters to insert, delete or replace."""
    costs = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, costs[0] = costs[0], i
        for j, right in enumerate(b, start=1):
            replaced = diagonal + (left != right)
            diagonal, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, replaced)
    return costs[-1]


def likeness(a: str, b: str) -> float:
    """1 - edit distance over the longer one's length, in [0, 1]; 1 for two empty texts."""
    longest = max(len(a), len(b))
    return 1 - edit_distance(a, b) / longest if longest else 1.0


def fidelity(wanted: Sequence[str], found: Sequence[str], *, normal: Normal) -> float:
    """How truly the texts ``wanted`` are those of the lines ``found``, in [0, 1].

    One text is compared with all lines in reading order. Several may stand anywhere: they are
    paired with lines so that the fewest characters differ, and whatever finds no partner counts in
    full; or they are compared as one text in order, where that says more (a text broken over two
    lines has no one line as its partner).
    """
    wanted = [normal(text) for text in wanted]
    found = [text for line in found if (text := normal(line))]
    between = "" if normal.ignore_spaces else " "
    in_order = likeness(between.join(wanted), between.join(found))
    if len(wanted) < 2 or not found:
        return in_order
    costs_WF = np.array([[edit_distance(a, b) for b in found] for a in wanted])
    # Pairing two texts is worth what both would cost without a partner, less their distance.
    alone_WF = np.array([[len(a) + len(b) for b in found] for a in wanted])
    paired = best_pairs(alone_WF - costs_WF)
    wrong = sum(
        int(costs_WF[row, paired[row]]) if row in paired else len(text)
        for row, text in enumerate(wanted)
    )
    spare = [line for column, line in enumerate(found) if column not in paired.values()]
    wrong += sum(len(line) for line in spare)
    longest = sum(
        max(len(text), len(found[paired[row]])) if row in paired else len(text)
        for row, text in enumerate(wanted)
    ) + sum(len(line) for line in spare)
    return max(in_order, 1 - wrong / longest if longest else 1.0)
