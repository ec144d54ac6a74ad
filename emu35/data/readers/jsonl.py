"""JSON lines, one document each, in one of these forms::

    {"parts": [{"text": "..."}, {"image": "path"}, ...]}    interleaved, in reading order
    {"image": "path", "caption": "..."}                     a pair ("text" serves as "caption")
    {"text": "..."}                                         plain text
    {"task": "t2i", ...}                                    a task of fine-tuning, see task_table

``"id"`` is optional. A relative picture path starts at the folder of the file. Other keys are left
unread, unless they look like pictures in another form (``images``, ``image_url``): such a line is a
reject, since without its pictures it would be another document. Task records are read strictly: a
key that is not of the schema makes a reject, and so does one that an object has twice.
"""

import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from emu35.data.readers.records import (
    RawImage,
    RawRecord,
    RawText,
    Reason,
    RecordForm,
    Reject,
    is_readable,
    pair_record,
    text_record,
)
from emu35.data.readers.task_documents import Starts, task_documents
from emu35.data.readers.task_records import WrongTask, read_task


def read_jsonl(path: Path, *, starts: Starts = Starts.random) -> Iterator[RawRecord | Reject]:
    """Records of a JSON lines file; a bad line is a reject that names its number."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            offset += len(line)
            if line.strip():
                yield _read_line(
                    line,
                    id=f"{path.name}:{number}",
                    folder=path.parent,
                    starts=starts,
                    offset=offset,
                )


def _read_line(
    line: bytes, *, id: str, folder: Path, starts: Starts, offset: int
) -> RawRecord | Reject:
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
        return Reject(id=id, reason=Reason.bad_encoding, detail=str(error), offset=offset)
    except (ValueError, RecursionError) as error:
        return Reject(id=id, reason=Reason.bad_json, detail=str(error), offset=offset)
    if not isinstance(value, dict):
        return Reject(id=id, reason=Reason.bad_record, detail="not an object", offset=offset)
    record = cast(dict[str, Any], value)
    given = record.get("id")
    if isinstance(given, str | int):
        id = f"{id} {given}"
    if record.get("task") is not None:
        if twice:
            detail = (
                f"{reprlib.repr(twice[0])} stands twice in one object, which would hide one of its "
                "values; leave one out"
            )
            return Reject(id=id, reason=Reason.bad_task, detail=detail, offset=offset)
        return _read_task(record, id=id, folder=folder, starts=starts, offset=offset)
    try:
        return _read_record(record, id=id, folder=folder, offset=offset)
    except _WrongForm as error:
        detail = f"{error}; {_FORMS}"
        return Reject(id=id, reason=Reason.bad_record, detail=detail, offset=offset)


_FORMS = (
    'a line is {"parts": [{"text": "..."}, {"image": "path"}, ...]}, '
    '{"image": "path", "caption": "..."}, {"text": "..."} or {"task": "...", ...}'
)
_PICTURE_KEYS = ("image", "img", "picture", "photo")


class _WrongForm(Exception):
    """What in a line is not of the known forms."""


def _read_task(
    record: dict[str, Any], *, id: str, folder: Path, starts: Starts, offset: int
) -> RawRecord | Reject:
    try:
        task = read_task(record, folder=folder)
    except WrongTask as error:
        return Reject(id=id, reason=error.reason, detail=str(error), offset=offset)
    documents = task_documents(task, id=id, starts=starts)
    several = documents if [*documents] != [""] else {}
    parts = [] if several else documents[""]
    return RawRecord(id=id, parts=parts, form=RecordForm.task, offset=offset, several=several)


def _read_record(
    record: dict[str, Any], *, id: str, folder: Path, offset: int
) -> RawRecord | Reject:
    """Raises: _WrongForm."""
    _refuse_other_pictures(record, where="it")
    if "parts" in record:
        beside = [key for key in ("image", "text", "caption") if key in record]
        if beside:
            raise _WrongForm(f"it has 'parts' and beside them {beside}")
        return _read_parts(record["parts"], id=id, folder=folder, offset=offset)
    caption, text = record.get("caption"), record.get("text")
    if "image" in record:
        picture = _picture(record["image"], folder=folder, where="'image'")
        if not is_readable(picture):
            detail = str(record["image"])
            return Reject(id=id, reason=Reason.missing_file, detail=detail, offset=offset)
        words = text if caption is None else caption
        words = words if isinstance(words, str) else None
        return pair_record(id=id, caption=words, picture=picture, offset=offset)
    if isinstance(caption, str):
        return pair_record(id=id, caption=caption, picture=None, offset=offset)
    if isinstance(text, str):
        return text_record(id=id, data=text, offset=offset)
    raise _WrongForm(f"it has {sorted(record)}")


def _read_parts(value: Any, *, id: str, folder: Path, offset: int) -> RawRecord | Reject:
    """Raises: _WrongForm."""
    if not isinstance(value, list):
        raise _WrongForm("'parts' is not a list")
    parts: list[RawText | RawImage] = []
    for number, entry in enumerate(cast(list[Any], value)):
        part = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
        where = f"part {number}"
        _refuse_other_pictures(part, where=where)
        if ("text" in part) == ("image" in part):
            found = "both" if "text" in part else "neither"
            raise _WrongForm(f"{where} must have a text or an image, and has {found}")
        if "image" in part:
            picture = _picture(part["image"], folder=folder, where=f"{where}: 'image'")
            if not is_readable(picture):
                detail = f"{where}: {part['image']}"
                return Reject(id=id, reason=Reason.missing_file, detail=detail, offset=offset)
            parts.append(RawImage(picture))
        elif isinstance(part["text"], str):
            parts.append(RawText(part["text"]))
        else:
            raise _WrongForm(f"{where}: 'text' is not a string")
    if not any(isinstance(part, RawImage) or part.text.strip() for part in parts):
        return Reject(id=id, reason=Reason.empty, offset=offset)
    return RawRecord(id=id, parts=list(parts), form=RecordForm.sequence, offset=offset)


def _picture(value: Any, *, folder: Path, where: str) -> Path:
    """The path of a picture. Raises: _WrongForm if ``value`` is none."""
    if isinstance(value, str):
        return folder / value
    if isinstance(value, list):
        raise _WrongForm(f"{where} is a list; several pictures need the form 'parts'")
    raise _WrongForm(f"{where} is {'null' if value is None else 'no string'}, not a path")


def _refuse_other_pictures(fields: dict[str, Any], *, where: str) -> None:
    """Raises: _WrongForm for a key that seems to hold pictures and is not read."""
    # Beside pictures that are read, image_url and the like say where they came from.
    suspects = "images" if "image" in fields or "parts" in fields else _PICTURE_KEYS
    for key, value in fields.items():
        if key == "image" or not key.lower().startswith(suspects):
            continue
        # Numbers and empty values, such as image_count or an empty list, name no picture.
        if value and isinstance(value, str | list | dict):
            raise _WrongForm(f"{where} has pictures under {key!r}, which is not read")
