"""What an earlier call left in the output folder, told from what is not ours.

A call removes the files of the one before it, so that nothing of them survives between its own. It
goes by ``results.jsonl``, which lists every file before it is written; and as that name, and those
of the page and the story, are such as others use too, nothing is touched unless every row is one
that ``emu35 generate`` writes.
"""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from emu35.errors import ConfigError, DataError
from emu35.stages.view.sources import RESULTS

PAGE = "index.html"
DIALOGUE = "story.pb"
"""All turns of a dialogue as one story."""

_NAME = re.compile(
    r"\d{3,}_(?:prompt\.txt|text\.txt|story\.pb|\d{2,}_image\.png|reference_image(?:_\d+)?\.png)",
    re.ASCII,
)
"""How files of an answer are called."""

_BEGINNINGS = (b'{"index": 0, "id": "', b'{"index": 0, "prompt": "')
"""How rows begin, with 0 for any number: for the one that a kill has torn."""


def earlier_files(folder: Path, *, writes: Collection[str]) -> list[str]:
    """Names of the files in ``folder`` that belong to an earlier call, ``results.jsonl`` last; some
    of them may not exist. ``writes`` are those of :data:`PAGE` and :data:`DIALOGUE` that the coming
    call writes: without a row of ours beside them they are somebody else's.

    Raises:
        ConfigError: the call would remove files, or write over some, that are not ours.
        DataError: ``results.jsonl`` cannot be read.
    """
    results = folder / RESULTS
    try:
        rows = _rows(results) if os.path.lexists(results) else []
    except OSError as error:
        raise DataError(
            f"{results} cannot be read ({error.strerror}), so its files cannot be told from "
            "others; name another folder with --out"
        ) from error
    if rows:
        names = dict.fromkeys(name for names in rows for name in names)
        return [*names, PAGE, DIALOGUE, RESULTS]
    if foreign := [name for name in sorted(writes) if os.path.lexists(folder / name)]:
        raise _refusal(folder, f"{' and '.join(foreign)} would be written over")
    return [RESULTS]


def _rows(results: Path) -> list[list[str]]:
    """The files that each row names, without a last row that a kill has torn: that one was being
    written before any of its files was.

    Raises:
        ConfigError: a line is no row of ours.
    """
    rows: list[list[str]] = []
    with results.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                if _torn(line):
                    continue
                row = None
            names = _names(row)
            if names is None:
                raise _refusal(
                    results.parent,
                    f"line {number} of {RESULTS} is no row of emu35 generate "
                    "(index, prompt, parts, and files as it names them)",
                )
            rows.append(names)
    return rows


def _torn(line: bytes) -> bool:
    """Whether ``line`` is the beginning of a row of ours, without its end."""
    line = re.sub(rb"^(\D+)\d+", rb"\g<1>0", line, count=1)
    begins = any(line[: len(row)] == row[: len(line)] for row in _BEGINNINGS)
    return begins and not line.endswith(b"\n")


def _names(row: Any) -> list[str] | None:
    """The files that ``row`` names; None if it is no row of ours."""
    match row:
        case {"index": int(), "prompt": str(), "parts": list(), "files": list(files)}:
            ours = all(isinstance(name, str) and _NAME.fullmatch(name) for name in files)
            return files if ours else None
        case _:
            return None


def _refusal(folder: Path, what: str) -> ConfigError:
    return ConfigError(
        f"out={folder} holds files that emu35 generate did not make: {what}. It removes and "
        "replaces only its own; name another folder with --out, or move the files away"
    )
