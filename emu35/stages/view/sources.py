"""From files and folders to stories."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from emu35.data.story import MAX_BYTES, Picture, Story, build_story, decode_story
from emu35.errors import DataError
from emu35.stages.view.layout import is_layout, read_layout
from emu35.stages.view.shown import Shown
from emu35.tokens.answer import read_answer
from emu35.tokens.document import Document, Image, Part, Special, Text

RESULTS = "results.jsonl"
"""What ``emu35 generate`` lists its answers in."""


def read_stories(source: Path) -> Iterator[Shown]:
    """The stories of ``source``, read one at a time.

    A folder is, in this order: one that ``emu35 generate`` wrote, one of ``.pb`` files, one in the
    layout of the official viewer. What cannot be read is a ``Shown`` without a story.

    Raises:
        DataError: ``source`` does not exist, or is a folder of nothing that can be shown.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist; name a .pb file, or a folder")
    if not source.is_dir():
        return iter([_read_pb(source)])
    try:
        files = sorted((path for path in source.iterdir() if path.is_file()), key=_natural)
    except OSError as error:
        raise DataError(f"cannot read folder {source}: {error.strerror}") from error
    if any(path.name == RESULTS for path in files):
        return _read_results(source / RESULTS)
    if stored := [path for path in files if path.suffix.lower() == ".pb"]:
        return (_read_pb(path) for path in stored)
    if is_layout(files):
        return iter([read_layout(source, files=files)])
    raise DataError(
        f"nothing to show in {source}: it has no {RESULTS} of emu35 generate, no .pb file, and no "
        "file of the official viewer such as 000_question.txt; name the folder that has them"
    )


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts 2.pb before 10.pb."""
    pieces = re.split(r"(\d+)", path.name)
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]


def _read_pb(path: Path) -> Shown:
    try:
        if not path.is_file():
            raise DataError("it is no regular file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{size} bytes are more than a protobuf message can have ({MAX_BYTES})")
        story = decode_story(path.read_bytes())
        if story == Story():
            raise DataError(f"{size} bytes, but no field of a story in them")
    except (DataError, OSError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return Shown(story=None, name=path.name, problems=[reason])
    return Shown(story=story, name=path.name, folder=path.parent)


def _read_results(path: Path) -> Iterator[Shown]:
    """One story for each prompt, without holding the file: its rows hold all ids.

    A generation that was killed leaves several rows of a prompt; the last one knows most.
    """
    last: dict[int | str, int] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    last[_prompt_index(line, default=f"line {number}")] = number
        with path.open("rb") as file:
            chosen = frozenset(last.values())
            for number, line in enumerate(file, start=1):
                if number in chosen:
                    yield _read_row(line, name=f"{path.name} line {number}", folder=path.parent)
    except OSError as error:
        yield Shown(story=None, name=path.name, problems=[error.strerror or str(error)])
        return
    if not last:
        yield Shown(story=None, name=path.name, problems=["it has no rows"])


def _prompt_index(line: bytes, *, default: str) -> int | str:
    """The number of a row's prompt, or ``default``, since a line may be anything."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return default
    match row:
        case {"index": int(index)}:
            return index
    return default


def _read_row(line: bytes, *, name: str, folder: Path) -> Shown:
    try:
        row = json.loads(line.decode(errors="replace"))
        return _from_row(row, name=name, folder=folder)
    except (ValueError, RecursionError) as error:
        reason = f"not JSON: {error}"
    except DataError as error:
        reason = str(error)
    return Shown(story=None, name=name, problems=[reason])


def _from_row(row: Any, *, name: str, folder: Path) -> Shown:
    match row:
        case {"prompt": str(prompt), "parts": list(stored)}:
            pass
        case _:
            raise DataError("no row of emu35 generate: it has no prompt or no parts")
    parts: list[Part] = []
    pictures: list[Picture] = []
    for part in stored:
        match part:
            case {"text": str(text)}:
                parts.append(Text(text))
            case {"special": str(token)}:
                parts.append(Special(token))
            case {"image": str(file)}:
                # The codes are not read; what stands for them is the number of the picture.
                parts.append(Image(np.array([[len(pictures)]])))
                pictures.append(Picture(image_path=file))
            case _:
                raise DataError(f"{str(part)[:60]} is neither text, special nor image")
    answer = read_answer(Document(parts))
    kept = [int(image.codes_HW[0, 0]) for image in answer.images]
    match row:
        case {"index": int(index), "id": str(id)}:
            name = f"prompt {index} ({id})"
        case {"index": int(index)}:
            name = f"prompt {index}"
    story = build_story(
        answer,
        question=prompt,
        pictures=[pictures[number] for number in kept],
        references=[Picture(image_path=file) for file in _strings(row, "references")],
    )
    problems = [*_strings(row, "problems"), *answer.problems]
    if "finish" in row and row["finish"] is None:
        problems.append("generation was stopped before this answer was finished")
    return Shown(story=story, name=name, problems=problems, folder=folder)


def _strings(row: Any, key: str) -> list[str]:
    """The strings of the list ``row[key]``; none where it has no such list."""
    value = row.get(key)
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
