"""Records of named fields, whatever file they come from: a line of JSON, or a row of parquet.

A record is of the first of these forms that fits::

    {"task": "t2i", ...}                                    a task of fine-tuning, see task_table
    {"conversations": [...], "image": "path"}               a dialogue of LLaVA, see dialogues
    {"source": "path", "instruction": "...", "target": "path"}    an edit, see dialogues
    {"images": ["path", null], "texts": [null, "..."]}      interleaved, as OBELICS and OmniCorpus
    {"parts": [{"text": "..."}, {"image": "path"}, ...]}    interleaved, in reading order
    {"image": "path", "caption": "..."}                     a pair ("text" or "txt" serve as
                                                            "caption", "jpg" or "png" as "image")
    {"text": "..."}                                         plain text

A picture is a path, or in parquet also its bytes, alone or as ``{"bytes": ..., "path": ...}``. A
relative path starts at the folder of the file unless another is given. An address (``https://``) is
a reject: ingestion downloads nothing. Other keys are left unread, unless they look like pictures in
another form (``images``, ``image_url``): such a record is a reject, since without its pictures it
would be another document. Task records are read strictly: a key that is not of the schema makes a
reject.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from emu35.data.readers.dialogues import (
    CONVERSATIONS,
    WrongDialogue,
    is_edit,
    read_conversation,
    read_edit,
)
from emu35.data.readers.named_pictures import PICTURE_FILES, NoPicture, WrongPicture, named_picture
from emu35.data.readers.records import (
    PictureData,
    RawImage,
    RawPart,
    RawRecord,
    RawText,
    Reason,
    RecordForm,
    Reject,
    pair_record,
    text_record,
)
from emu35.data.readers.task_documents import Starts, task_documents
from emu35.data.readers.task_records import TaskRecord, WrongTask, read_task
from emu35.tokens.template import Task

Row = Mapping[str, Any]

_FORMS = (
    'a record is {"parts": [{"text": "..."}, {"image": "path"}, ...]}, '
    '{"images": [...], "texts": [...]}, {"image": "path", "caption": "..."}, {"text": "..."}, '
    '{"conversations": [...]}, {"source": "path", "instruction": "...", "target": "path"} or '
    '{"task": "...", ...}'
)
_PICTURE_KEYS = ("image", "img", "picture", "photo")
_PARAGRAPH = "\n\n"
"""Between texts of an interleaved record that no picture parts, as OBELICS joins its own."""


class _WrongForm(Exception):
    """What in a record is not of the known forms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a record comes from and how it is read: ``folder`` is where relative picture paths
    start, ``id`` and ``offset`` are those of the record."""

    id: str
    folder: Path
    offset: int
    starts: Starts = Starts.random


def read_row(row: Row, *, place: Place) -> RawRecord | Reject:
    """The record that the fields of ``row`` make, or the reject that says what is wrong."""
    try:
        if is_task(row):
            return _task_record(read_task(row, folder=place.folder), row=row, place=place)
        if row.get(CONVERSATIONS) is not None:
            task = read_conversation(row, folder=place.folder)
            return _task_record(task, row=row, place=place)
        if is_edit(row):
            return _task_record(read_edit(row, folder=place.folder), row=row, place=place)
        return _read_plain(row, place=place)
    except (WrongTask, WrongDialogue) as error:
        return _reject(place, error.reason, str(error))
    except NoPicture as error:
        return _reject(place, error.reason, str(error))
    except (WrongPicture, _WrongForm) as error:
        return _reject(place, Reason.bad_record, f"{error}; {_FORMS}")


def is_task(row: Row) -> bool:
    """Whether it says that it is a task record; published edits have a ``task`` of their own."""
    name = row.get("task")
    return name is not None and (name in list(Task) or not is_edit(row))


def _task_record(task: TaskRecord, *, row: Row, place: Place) -> RawRecord:
    documents = task_documents(task, id=place.id, starts=place.starts)
    several = documents if [*documents] != [""] else {}
    return RawRecord(
        id=place.id,
        parts=[] if several else documents[""],
        form=RecordForm.task,
        offset=place.offset,
        several=several,
        fields=row,
    )


def _read_plain(row: Row, *, place: Place) -> RawRecord | Reject:
    """Raises: _WrongForm, WrongPicture, NoPicture."""
    if isinstance(row.get("texts"), list) and isinstance(row.get("images"), list):
        return _read_lists(row, place=place)
    _refuse_other_pictures(row, where="it")
    if "parts" in row:
        beside = [key for key in ("image", "text", "caption") if key in row]
        if beside:
            raise _WrongForm(f"it has 'parts' and beside them {beside}")
        return _read_parts(row, place=place)
    key = next((key for key in ("image", *PICTURE_FILES) if key in row), None)
    words = [row.get(key) for key in ("caption", "txt", "text")]
    caption = next((text for text in words if isinstance(text, str)), None)
    if key is not None:
        if row[key] is None and key != "image":
            # What img2dataset could not download has a row all the same.
            told = (str(row[name]) for name in ("status", "error_message") if row.get(name))
            why = ": ".join(told)
            return pair_record(
                id=place.id, caption=caption, picture=None, offset=place.offset, why_none=why
            )
        picture = named_picture(row[key], folder=place.folder, where=repr(key))
        return _pair(place, row=row, caption=caption, picture=picture)
    text = row.get("text")
    if isinstance(row.get("caption"), str):
        return _pair(place, row=row, caption=caption, picture=None)
    if isinstance(text, str):
        return text_record(id=place.id, data=text, offset=place.offset)
    raise _WrongForm(f"it has {sorted(row)}")


def _pair(
    place: Place, *, row: Row, caption: str | None, picture: PictureData | None
) -> RawRecord | Reject:
    return pair_record(
        id=place.id, caption=caption, picture=picture, offset=place.offset, fields=row
    )


def _read_lists(row: Row, *, place: Place) -> RawRecord | Reject:
    """Raises: _WrongForm, WrongPicture, NoPicture."""
    images, texts = cast(list[Any], row["images"]), cast(list[Any], row["texts"])
    if len(images) != len(texts):
        raise _WrongForm(
            f"it has {len(images)} images and {len(texts)} texts; both lists must be as long as "
            "the document, with null where the other one has something"
        )
    parts: list[RawPart] = []
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        if image is not None and text is not None:
            raise _WrongForm(f"images[{number}] and texts[{number}] are both given; one is null")
        if image is not None:
            where = f"images[{number}]"
            parts.append(RawImage(named_picture(image, folder=place.folder, where=where)))
        elif text is not None:
            if not isinstance(text, str):
                raise _WrongForm(f"texts[{number}] is not a string")
            apart = bool(parts) and isinstance(parts[-1], RawText)
            parts.append(RawText(f"{_PARAGRAPH}{text}" if apart else text))
    return _sequence(place, row=row, parts=parts)


def _read_parts(row: Row, *, place: Place) -> RawRecord | Reject:
    """Raises: _WrongForm, WrongPicture, NoPicture."""
    value = row["parts"]
    if not isinstance(value, list):
        raise _WrongForm("'parts' is not a list")
    parts: list[RawPart] = []
    for number, entry in enumerate(cast(list[Any], value)):
        given = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
        where = f"part {number}"
        _refuse_other_pictures(given, where=where)
        # In parquet every part has both fields, one of them null.
        both = {key: given[key] for key in ("text", "image") if key in given}
        part = {key: v for key, v in both.items() if v is not None} if len(both) > 1 else both
        if len(part) != 1:
            found = "both" if part else "neither"
            raise _WrongForm(f"{where} must have a text or an image, and has {found}")
        if "image" in part:
            picture = named_picture(part["image"], folder=place.folder, where=f"{where}: 'image'")
            parts.append(RawImage(picture))
        elif isinstance(part["text"], str):
            parts.append(RawText(part["text"]))
        else:
            raise _WrongForm(f"{where}: 'text' is not a string")
    return _sequence(place, row=row, parts=parts)


def _sequence(place: Place, *, row: Row, parts: Sequence[RawPart]) -> RawRecord | Reject:
    if not any(not isinstance(part, RawText) or part.text.strip() for part in parts):
        return _reject(place, Reason.empty, "")
    return RawRecord(
        id=place.id,
        parts=list(parts),
        form=RecordForm.sequence,
        offset=place.offset,
        fields=row,
    )


def _refuse_other_pictures(fields: Row, *, where: str) -> None:
    """Raises: _WrongForm for a key that seems to hold pictures and is not read."""
    # Beside pictures that are read, image_url and the like say where they came from.
    read = any(key in fields for key in ("image", "parts", *PICTURE_FILES))
    suspects = "images" if read else _PICTURE_KEYS
    for key, value in fields.items():
        if key == "image" or not key.lower().startswith(suspects):
            continue
        # Numbers and empty values, such as image_count or an empty list, name no picture.
        if value and isinstance(value, str | bytes | list | dict):
            raise _WrongForm(f"{where} has pictures under {key!r}, which is not read")


def _reject(place: Place, reason: str, detail: str) -> Reject:
    return Reject(id=place.id, reason=reason, detail=detail, offset=place.offset)
