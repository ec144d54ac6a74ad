"""Benchmarks of interleaved generation as published: an item becomes one document, the parts of the
question followed by those of the ground truth, so that a loss can be taken over all of it.

====================  ============================================================================
``isg_bench``         ISG-Bench (arXiv 2411.17188), ``ISG-Bench.jsonl``: a line has ``"id"``,
                      ``"Query"`` and ``"Golden"``, both lists of ``{"type": "text" | "image",
                      "content": str}``
``opening``           OpenING (arXiv 2411.18499), ``test_data.jsonl`` or ``dev_data.jsonl``: a line
                      has ``"total_uid"`` and ``"conversations": [{"input": [...]}, {"output":
                      [...]}]`` of entries ``{"text": str, "image": path or null}``
``mmie``              MMIE (arXiv 2410.10139), one JSON file with a list: an item has ``"id"``,
                      ``"question"`` and ``"gt_answer"``, lists of ``{"text": str or null, "image":
                      path or null}``
====================  ============================================================================

Picture paths start at the folder of the file. What the publications do and is taken as meant:

- names ending in ``.JPG`` for files ending in ``.jpg`` and the other way round (ISG-Bench);
- ``<image>`` in a text stands where its picture goes, ``<BEGIN>`` where the question proper begins;
  neither becomes text (OpenING). In an entry without ``<image>`` the picture follows the text;
- an empty ``gt_answer`` beside ``"model": "gt"``, where ``"answer"`` is the ground truth; an answer
  that is one string; JSON lines instead of a list (MMIE).

Texts that meet, such as a question and an answer that begins with text, are joined by a line break.
Everything else is a reject that names the item: an unknown type, a missing key, an item without
question or ground truth (also one of blank texts alone), a picture that is not there, more places
for pictures than pictures. Keys that are not named here (categories, scene graphs, scores) are left
unread.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from emu35.data.readers.records import (
    RawImage,
    RawPart,
    RawRecord,
    RawText,
    Reason,
    RecordForm,
    Reject,
    is_readable,
)


class Layout(StrEnum):
    """A benchmark whose published form can be read."""

    isg_bench = "isg_bench"
    opening = "opening"
    mmie = "mmie"


def read_isg_bench(path: Path) -> Iterator[RawRecord | Reject]:
    """The items of ISG-Bench."""
    return _read(path, id_key="id", sides=_isg_sides)


def read_opening(path: Path) -> Iterator[RawRecord | Reject]:
    """The items of OpenING."""
    return _read(path, id_key="total_uid", sides=_opening_sides)


def read_mmie(path: Path) -> Iterator[RawRecord | Reject]:
    """The items of MMIE."""
    return _read(path, id_key="id", sides=_mmie_sides)


BENCHMARKS: dict[Layout, Callable[[Path], Iterator[RawRecord | Reject]]] = {
    Layout.isg_bench: read_isg_bench,
    Layout.opening: read_opening,
    Layout.mmie: read_mmie,
}

Fields = dict[str, Any]
Sides = Callable[[Fields, Path], dict[str, list[RawPart]]]
"""From an item and the folder of its pictures: key -> parts, of the question and of the truth."""

_BEGIN = re.compile(r"\s*<BEGIN>\s*")
_PLACE = "<image>"


class _WrongForm(Exception):
    """What in an item is not of the published form."""


class _MissingPicture(Exception):
    """A picture that an item names and that is not there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """An undecoded item, its number from 1 and the bytes of the file up to its end."""

    number: int
    value: Any
    offset: int


def _read(path: Path, *, id_key: str, sides: Sides) -> Iterator[RawRecord | Reject]:
    for line in _items(path):
        if isinstance(line, Reject):
            yield line
        else:
            yield _document(line, file=path, id_key=id_key, sides=sides)


def _document(line: _Line, *, file: Path, id_key: str, sides: Sides) -> RawRecord | Reject:
    id = f"{file.name}:{line.number}"
    value: Any = line.value
    try:
        if not isinstance(value, dict):
            raise _WrongForm("not an object")
        item = cast(Fields, value)
        if isinstance(item.get(id_key), str | int):
            id = f"{id} {item[id_key]}"
        found = _whole(sides(item, file.parent))
    except _WrongForm as error:
        detail = str(error)
        return Reject(id=id, reason=Reason.bad_record, detail=detail, offset=line.offset)
    except _MissingPicture as error:
        detail = str(error)
        return Reject(id=id, reason=Reason.missing_file, detail=detail, offset=line.offset)
    return RawRecord(id=id, parts=found, form=RecordForm.sequence, offset=line.offset)


def _items(path: Path) -> Iterator[_Line | Reject]:
    """The items of a file with a JSON list, or with an object a line."""
    content = path.read_bytes()
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        try:
            values: Any = json.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # also covers bytes that are not UTF-8
            yield Reject(id=path.name, reason=Reason.bad_json, detail=str(error))
            return
        items = cast(list[Any], values)
        for index, value in enumerate(items):
            offset = len(content) * (index + 1) // len(items)
            yield _Line(number=index + 1, value=value, offset=offset)
        return
    offset = 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        offset += len(line)
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            name = f"{path.name}:{number}"
            yield Reject(id=name, reason=Reason.bad_json, detail=str(error), offset=offset)
            continue
        yield _Line(number=number, value=value, offset=offset)


def _isg_sides(item: Fields, folder: Path) -> dict[str, list[RawPart]]:
    """Raises: _WrongForm, _MissingPicture."""
    return {
        key: [
            _isg_part(entry, folder=folder, where=f"{key}[{index}]")
            for index, entry in enumerate(_entries(item, key=key))
        ]
        for key in ("Query", "Golden")
    }


def _isg_part(entry: Fields, *, folder: Path, where: str) -> RawPart:
    """Raises: _WrongForm, _MissingPicture."""
    kind, content = entry.get("type"), entry.get("content")
    if not isinstance(content, str):
        raise _WrongForm(f"{where} has no string under 'content'")
    if kind == "text":
        return RawText(content)
    if kind == "image":
        return _picture(content, folder=folder, where=where)
    raise _WrongForm(f"{where} has type {kind!r}; it must be 'text' or 'image'")


def _opening_sides(item: Fields, folder: Path) -> dict[str, list[RawPart]]:
    """Raises: _WrongForm, _MissingPicture."""
    turns = _entries(item, key="conversations")
    if [list(turn) for turn in turns] != [["input"], ["output"]]:
        found = [sorted(turn) for turn in turns]
        raise _WrongForm(f"'conversations' has {found}; it must be an input and then an output")
    return {
        key: _texts_and_pictures(turn, key=key, folder=folder)
        for turn, key in zip(turns, ("input", "output"), strict=True)
    }


def _mmie_sides(item: Fields, folder: Path) -> dict[str, list[RawPart]]:
    """Raises: _WrongForm, _MissingPicture."""
    answer = "gt_answer"
    if not _has_content(item.get(answer)) and item.get("model") == "gt":
        answer = "answer"
    if isinstance(item.get(answer), str):
        item = {**item, answer: [{"text": item[answer]}]}
    return {key: _texts_and_pictures(item, key=key, folder=folder) for key in ("question", answer)}


def _texts_and_pictures(item: Fields, *, key: str, folder: Path) -> list[RawPart]:
    """Raises: _WrongForm, _MissingPicture."""
    return [
        part
        for index, entry in enumerate(_entries(item, key=key))
        for part in _text_and_picture(entry, folder=folder, where=f"{key}[{index}]")
    ]


def _has_content(value: Any) -> bool:
    if not isinstance(value, list):
        return bool(value)
    entries = [cast(Fields, e) for e in cast(list[Any], value) if isinstance(e, dict)]
    values = [value for entry in entries for value in entry.values()]
    return any(value.strip() if isinstance(value, str) else value for value in values)


def _entries(item: Fields, *, key: str) -> list[Fields]:
    """The objects in the list ``item[key]``. Raises: _WrongForm if it is none."""
    value = item.get(key)
    if not isinstance(value, list):
        raise _WrongForm(f"it has no list under {key!r}")
    entries = cast(list[Any], value)
    if not all(isinstance(entry, dict) for entry in entries):
        raise _WrongForm(f"{key!r} holds something that is no object")
    return cast(list[Fields], entries)


def _text_and_picture(entry: Fields, *, folder: Path, where: str) -> list[RawPart]:
    """An entry with one text and one picture, either of which may be null.

    Raises: _WrongForm, _MissingPicture.
    """
    text, image = entry.get("text"), entry.get("image")
    if not isinstance(text, str | None) or not isinstance(image, str | None):
        raise _WrongForm(f"{where}: 'text' and 'image' must each be a string or null")
    before, *after = _BEGIN.sub(" ", text or "").split(_PLACE)
    if len(after) > bool(image):
        held = "one picture" if image else "no picture"
        raise _WrongForm(f"{where} has {len(after)} places {_PLACE} for {held}")
    if not image:
        return [RawText(before)]
    picture = _picture(image, folder=folder, where=where)
    return [RawText(before), picture, *(RawText(rest) for rest in after)]


def _picture(name: str, *, folder: Path, where: str) -> RawImage:
    """Raises: _MissingPicture."""
    path = folder / name
    suffix = path.suffix
    for ending in (suffix, suffix.lower(), suffix.upper()):
        found = path.with_name(path.name.removesuffix(suffix) + ending)
        if is_readable(found):
            return RawImage(found)
    raise _MissingPicture(f"{where}: {name}")


def _whole(sides: dict[str, list[RawPart]]) -> list[RawPart]:
    """The parts of both sides. Raises: _WrongForm if a side shows and says nothing."""
    for key, parts in sides.items():
        if not _joined(parts):
            raise _WrongForm(f"{key!r} is empty")
    return _joined([part for parts in sides.values() for part in parts])


def _joined(parts: list[RawPart]) -> list[RawPart]:
    """Texts without the space around them, empty ones left out, neighbours joined by a line."""
    joined: list[RawPart] = []
    for part in parts:
        if not isinstance(part, RawText):
            joined.append(part)
        elif text := part.text.strip():
            last = joined[-1] if joined else None
            if isinstance(last, RawText):
                joined[-1] = RawText(f"{last.text}\n{text}")
            else:
                joined.append(RawText(text))
    return joined
