"""JSON lines, one document each, in one of three forms::

    {"parts": [{"text": "..."}, {"image": "path"}, ...]}    interleaved, in reading order
    {"image": "path", "caption": "..."}                     a pair ("text" serves as "caption")
    {"text": "..."}                                         plain text

``"id"`` is optional. A relative picture path starts at the folder of the file.
"""

import json
from collections.abc import Iterator
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
    pair_record,
    text_record,
)


def read_jsonl(path: Path) -> Iterator[RawRecord | Reject]:
    """Records of a JSON lines file; a bad line is a reject that names its number."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            offset += len(line)
            if line.strip():
                yield _read_line(
                    line, id=f"{path.name}:{number}", folder=path.parent, offset=offset
                )


def _read_line(line: bytes, *, id: str, folder: Path, offset: int) -> RawRecord | Reject:
    try:
        value: Any = json.loads(line.decode("utf-8-sig"))
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
    text = record.get("caption", record.get("text"))
    if "parts" in record:
        return _read_parts(record["parts"], id=id, folder=folder, offset=offset)
    if isinstance(record.get("image"), str):
        picture = folder / record["image"]
        if not is_readable(picture):
            detail = str(record["image"])
            return Reject(id=id, reason=Reason.missing_file, detail=detail, offset=offset)
        caption = text if isinstance(text, str) else None
        return pair_record(id=id, caption=caption, picture=picture, offset=offset)
    if isinstance(text, str):
        return text_record(id=id, data=text, offset=offset)
    detail = f"needs 'parts', 'text' or 'image'; has {sorted(record)}"
    return Reject(id=id, reason=Reason.bad_record, detail=detail, offset=offset)


def _read_parts(value: Any, *, id: str, folder: Path, offset: int) -> RawRecord | Reject:
    if not isinstance(value, list):
        detail = "'parts' is not a list"
        return Reject(id=id, reason=Reason.bad_record, detail=detail, offset=offset)
    parts: list[RawPart] = []
    for number, entry in enumerate(cast(list[Any], value)):
        part = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
        if isinstance(part.get("text"), str):
            parts.append(RawText(part["text"]))
        elif isinstance(part.get("image"), str):
            picture = folder / part["image"]
            if not is_readable(picture):
                detail = f"part {number}: {part['image']}"
                return Reject(id=id, reason=Reason.missing_file, detail=detail, offset=offset)
            parts.append(RawImage(picture))
        else:
            detail = f"part {number} is neither a text nor an image"
            return Reject(id=id, reason=Reason.bad_record, detail=detail, offset=offset)
    if not any(isinstance(part, RawImage) or part.text.strip() for part in parts):
        return Reject(id=id, reason=Reason.empty, offset=offset)
    return RawRecord(id=id, parts=parts, form=RecordForm.sequence, offset=offset)
