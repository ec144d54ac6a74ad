"""JSON: an object a line, or one list of objects, as conversations are published.

What an object may be is told in :mod:`emu35.data.readers.rows`; ``"id"`` is optional. A key that an
object of a task record has twice makes a reject.
"""

import codecs
import json
import reprlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from emu35.data.readers.records import RawRecord, Reason, Reject
from emu35.data.readers.rows import Place, is_task, read_row
from emu35.data.readers.task_documents import Starts

_CHUNK = 2**20
LARGEST_ENTRY = 64 * 2**20
"""Bytes of one entry of a JSON list; beyond, the list is taken for damaged."""


def read_jsonl(
    path: Path, *, starts: Starts = Starts.random, pictures: Path | None = None
) -> Iterator[RawRecord | Reject]:
    """Records of a JSON lines file; a bad line is a reject that names its number.

    Relative picture paths start at ``pictures``, or at the folder of the file.
    """
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            offset += len(line)
            if line.strip():
                place = Place(
                    id=f"{path.name}:{number}",
                    folder=pictures or path.parent,
                    offset=offset,
                    starts=starts,
                )
                yield _read_line(line, place=place)


def read_json_list(
    path: Path, *, starts: Starts = Starts.random, pictures: Path | None = None
) -> Iterator[RawRecord | Reject]:
    """Records of a file that is one JSON list, read piece by piece since it may be huge.

    Where it is no longer JSON it ends in a reject that says so.
    """
    number = 0
    try:
        for value, offset in _list_entries(path):
            number += 1
            place = Place(
                id=f"{path.name}:{number}",
                folder=pictures or path.parent,
                offset=offset,
                starts=starts,
            )
            yield _read_value(value, place=place)
    except (ValueError, RecursionError) as error:
        yield Reject(
            id=f"{path.name}:{number + 1}",
            reason=Reason.damaged_input,
            detail=f"the JSON list breaks off before this entry: {error}; the rest was lost",
        )


def _list_entries(path: Path) -> Iterator[tuple[Any, int]]:
    """Each entry, and the bytes read so far. Raises: ValueError, RecursionError."""
    decode = json.JSONDecoder().raw_decode
    text = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        buffer, end = "", False
        begun = closed = False

        def more(size: int) -> None:
            nonlocal buffer, end
            data = file.read(size)
            end = not data
            buffer += text.decode(data, final=end)

        while not closed:
            buffer = buffer.lstrip(" \t\r\n," if begun else " \t\r\n")
            if not buffer:
                if end:
                    raise ValueError("it has no closing bracket")
                more(_CHUNK)
                continue
            if not begun:
                if buffer[0] != "[":
                    raise ValueError("it does not begin with a bracket")
                begun, buffer = True, buffer[1:]
                continue
            if buffer[0] == "]":
                closed, buffer = True, buffer[1:]
                continue
            try:
                value, used = decode(buffer)
            except ValueError:
                if end or len(buffer) > LARGEST_ENTRY:
                    raise
                # Twice as much each time, so that a long entry is not parsed over and over.
                more(max(_CHUNK, len(buffer)))
                continue
            buffer = buffer[used:]
            yield value, file.tell() - len(buffer)
        while not end and not buffer.strip():
            buffer = ""
            more(_CHUNK)
        if buffer.strip():
            raise ValueError(
                f"something follows its closing bracket ({buffer.strip()[:20]!r}), as where lists "
                "were joined; write one list"
            )


def _read_line(line: bytes, *, place: Place) -> RawRecord | Reject:
    twice: list[str] = []

    def whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.extend(key for key in fields if keys.count(key) > 1)
        return fields

    try:
        value: Any = json.loads(line.decode("utf-8-sig"), object_pairs_hook=whole)
    except UnicodeDecodeError as error:
        return _reject(place, Reason.bad_encoding, str(error))
    except (ValueError, RecursionError) as error:
        return _reject(place, Reason.bad_json, str(error))
    return _read_value(value, place=place, twice=twice)


def _read_value(value: Any, *, place: Place, twice: list[str] | None = None) -> RawRecord | Reject:
    if not isinstance(value, dict):
        return _reject(place, Reason.bad_record, "not an object")
    row = cast(dict[str, Any], value)
    given = row.get("id")
    if isinstance(given, str | int):
        place = replace(place, id=f"{place.id} {given}")
    if twice and is_task(row):
        detail = (
            f"{reprlib.repr(twice[0])} stands twice in one object, which would hide one of its "
            "values; leave one out"
        )
        return _reject(place, Reason.bad_task, detail)
    return read_row(row, place=place)


def _reject(place: Place, reason: str, detail: str) -> Reject:
    return Reject(id=place.id, reason=reason, detail=detail, offset=place.offset)
