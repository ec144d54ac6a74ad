"""One document, taken apart: does everything that is said of its tokens agree with them?"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emu35.data.shards import RUN_CODE_BITS, Words, decode_runs
from emu35.data.validate.problem import Check
from emu35.tokens.serialize import Modality, modality_of
from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary

Ints = npt.NDArray[np.int64]
Grid = tuple[int, int, int, int]
"""Start, end, rows and columns of a picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What is wrong with a document."""

    check: Check
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Indexed:
    """What the index says of a document: its pictures [M, 2] and its tokens by modality [4]."""

    spans: Ints
    modality: Ints


class GridSizes:
    """How the size of a grid is spelled in ids; without a text table sizes are taken as given."""

    def __init__(self, tokenizer: TextTokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[int, int], list[int]] = {}

    def spelled(self, *, rows: int, columns: int, ids: list[int]) -> bool:
        """Whether ``ids`` say rows x columns."""
        if self._tokenizer is None:
            return True
        key = (rows, columns)
        if key not in self._known:
            self._known[key] = self._tokenizer.encode(f"{rows}*{columns}")
        return ids == self._known[key]


def parse_record(content: bytes) -> dict[str, Any] | None:
    """The JSON member of a document, None where it is none."""
    try:
        record: dict[str, Any] | list[Any] | str | float | None = json.loads(content)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def check_document(
    *,
    ids: Words,
    runs: Words,
    record: dict[str, Any] | None,
    indexed: Indexed | None,
    vocabulary: Vocabulary,
    sizes: GridSizes,
) -> Iterator[Fault]:
    """Everything that is wrong with a document of tokens ``ids`` [N]."""
    if record is None:
        yield Fault(check=Check.json, text="its JSON cannot be read")
    else:
        yield from _check_record(record, tokens=len(ids))
    outside = np.flatnonzero(ids >= vocabulary.size)
    if len(outside):
        yield Fault(
            check=Check.ids,
            text=f"id {ids[outside[0]]} at token {outside[0]} lies outside the vocabulary of "
            f"{vocabulary.size}{_more(len(outside))}",
        )
    yield from _check_modality(ids, runs=runs, indexed=indexed, vocabulary=vocabulary)
    found: list[Grid] = []
    for picture in _pictures(ids, vocabulary=vocabulary, sizes=sizes):
        if isinstance(picture, Fault):
            yield picture
        else:
            found.append(picture)
    if record is not None and record.get("images") != [list(grid) for grid in found]:
        yield Fault(
            check=Check.pictures,
            text=f"its JSON says that pictures lie at {_short(record.get('images'))}, "
            f"its tokens have them at {_short([list(grid) for grid in found])}",
        )
    if indexed is not None and indexed.spans.tolist() != [list(grid[:2]) for grid in found]:
        yield Fault(
            check=Check.pictures,
            text=f"its index says that pictures span {_short(indexed.spans.tolist())}, "
            f"its tokens have them at {_short([list(grid[:2]) for grid in found])}",
        )


def _check_record(record: dict[str, Any], *, tokens: int) -> Iterator[Fault]:
    if not isinstance(record.get("id"), str):
        yield Fault(check=Check.json, text="its JSON has no id")
    if record.get("tokens") != tokens:
        text = f"its JSON says {record.get('tokens')} tokens, it has {tokens}"
        yield Fault(check=Check.json, text=text)


def _check_modality(
    ids: Words, *, runs: Words, indexed: Indexed | None, vocabulary: Vocabulary
) -> Iterator[Fault]:
    lengths = runs.astype(np.int64) >> RUN_CODE_BITS
    if int(lengths.sum()) != len(ids):
        text = f"its modality runs cover {int(lengths.sum())} tokens, it has {len(ids)}"
        yield Fault(check=Check.modality, text=text)
        return
    codes = decode_runs(runs)
    if len(codes) and int(codes.max()) >= len(Modality):
        yield Fault(check=Check.modality, text=f"it has modality {codes.max()}, which is none")
        return
    wanted = modality_of(ids, vocabulary=vocabulary)
    wrong = np.flatnonzero(codes != wanted)
    if len(wrong):
        at = int(wrong[0])
        yield Fault(
            check=Check.modality,
            text=f"token {at} has id {ids[at]}, which is {Modality(wanted[at]).name}, but its "
            f"modality says {Modality(codes[at]).name}{_more(len(wrong))}",
        )
    counts = np.bincount(codes, minlength=len(Modality))
    if indexed is not None and not np.array_equal(indexed.modality, counts):
        yield Fault(
            check=Check.modality,
            text=f"its index counts {indexed.modality.tolist()} tokens by modality, its runs "
            f"{counts.tolist()}",
        )


def _pictures(ids: Words, *, vocabulary: Vocabulary, sizes: GridSizes) -> Iterator[Grid | Fault]:
    """The pictures of a document, or what keeps them from being some."""
    starts = np.flatnonzero(ids == vocabulary.boi)
    ends = np.flatnonzero(ids == vocabulary.eoi) + 1
    paired = len(starts) == len(ends) and bool(
        np.all(starts < ends) and np.all(starts[1:] >= ends[:-1])
    )
    if not paired:
        yield Fault(
            check=Check.pictures,
            text=f"{len(starts)} pictures begin and {len(ends)} end in it, not each where the one "
            "before has ended",
        )
        return
    inside = np.zeros(len(ids) + 1, np.int64)
    inside[starts] += 1
    inside[ends] -= 1
    layout = np.isin(ids, [vocabulary.eol, vocabulary.img]) | (ids >= vocabulary.visual_start)
    stray = np.flatnonzero(layout & (np.cumsum(inside)[:-1] == 0))
    if len(stray):
        yield Fault(
            check=Check.pictures,
            text=f"token {stray[0]} (id {ids[stray[0]]}) belongs into a picture and lies in none"
            f"{_more(len(stray))}",
        )
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        grid = _grid(ids[start:end], vocabulary=vocabulary, sizes=sizes)
        if isinstance(grid, str):
            yield Fault(check=Check.pictures, text=f"the picture at token {start} {grid}")
        else:
            yield (start, end, *grid)


def _grid(picture: Words, *, vocabulary: Vocabulary, sizes: GridSizes) -> tuple[int, int] | str:
    """Rows and columns of a picture from BOI to EOI, or what it does wrong."""
    marks = np.flatnonzero(picture == vocabulary.img)
    if len(marks) != 1:
        return f"has {len(marks)} marks (IMG) between its size and its codes"
    body = picture[int(marks[0]) + 1 : -1]
    breaks = np.flatnonzero(body == vocabulary.eol)
    widths = np.diff(breaks, prepend=-1, append=len(body)) - 1
    rows, columns = len(widths), int(widths[0])
    if columns == 0 or bool(np.any(widths != columns)):
        return f"is ragged: its rows have {_short(widths.tolist())} codes"
    codes = int(np.count_nonzero(body >= vocabulary.visual_start))
    if codes != rows * columns:
        return f"has {rows * columns - codes} ids among its codes that are none"
    if not sizes.spelled(rows=rows, columns=columns, ids=picture[1 : int(marks[0])].tolist()):
        return f"has {rows} rows of {columns} codes and says another size"
    return rows, columns


def _more(count: int) -> str:
    return f" (and {count - 1} more such tokens)" if count > 1 else ""


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]} ..."
