"""Parquet files, a record a row: a column ``text``, or the columns of one of the forms of
:mod:`emu35.data.readers.rows`. Reading them needs the extra ``parquet``."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from emu35.data.readers.dialogues import CONVERSATIONS, INSTRUCTIONS, SOURCES, TARGETS
from emu35.data.readers.named_pictures import PICTURE_FILES
from emu35.data.readers.records import RawRecord, Reason, Reject, text_record
from emu35.data.readers.rows import Place, read_row
from emu35.data.readers.task_documents import Starts
from emu35.errors import DataError

_TEXT = "text"
# Rows held at a time: rows may be whole books, or pictures.
_TEXT_ROWS, _PICTURE_ROWS = 4096, 32

_PAIR = ("image", *PICTURE_FILES)
_BESIDE = ("id", "key", "caption", "txt", _TEXT, "texts", "status", "error_message")


def load_pyarrow(path: Path) -> Any:
    """The module ``pyarrow.parquet``.

    Raises:
        DataError: if it cannot be imported, naming ``path`` and the extra to install.
    """
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(
            f"reading {path} needs pyarrow, which cannot be imported ({error}); "
            "run `pip install 'emu35[parquet]'`, or convert the file to JSON lines"
        ) from error


def read_parquet(
    path: Path,
    *,
    starts: Starts = Starts.random,
    pictures: Path | None = None,
    beside: Sequence[str] = (),
) -> Iterator[RawRecord | Reject]:
    """One record a row; of columns that no form has, those named ``beside`` are read, too.

    A damaged part of the file is a reject that names the rows lost with it; the row groups after it
    are still read. A file whose columns are of no form is one reject. Relative picture paths start
    at ``pictures``, or at the folder of the file.

    Raises:
        DataError: if pyarrow is not installed.
    """
    parquet = load_pyarrow(path)
    arrow: Any = importlib.import_module("pyarrow")
    # pyarrow raises OSError, without an errno, for bytes that it cannot make sense of.
    damage = (arrow.ArrowException, OSError)
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
    except damage as error:
        yield Reject(id=path.name, reason=Reason.damaged_input, detail=str(error))
        return
    with file:
        columns = _columns(file.schema_arrow.names)
        problem = None if columns else _schema_problem(file.schema_arrow, types=arrow.types)
        if problem is not None:
            yield Reject(id=path.name, reason=Reason.bad_record, detail=problem)
            return
        columns += [name for name in beside if columns and name in file.schema_arrow.names]
        folder = pictures or path.parent
        size = path.stat().st_size
        first, total = 0, max(file.metadata.num_rows, 1)
        for group in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            row = first
            try:
                for value in _read_group(file, group=group, columns=columns, arrow=arrow):
                    row += 1
                    place = Place(
                        id=f"{path.name}:{row}",
                        folder=folder,
                        offset=size * row // total,
                        starts=starts,
                    )
                    yield _record(value, place=place)
            except damage as error:
                yield Reject(
                    id=f"{path.name}:{row + 1}-{end}",
                    reason=Reason.damaged_input,
                    detail=f"these {end - row} rows cannot be read: {error}",
                    offset=size * end // total,
                )
            first = end


def _columns(names: Sequence[str]) -> list[str]:
    """The columns of a form of pictures or dialogues; none where the file is of plain text."""
    edit = any(name in names for name in INSTRUCTIONS) and any(name in names for name in TARGETS)
    if edit:
        own = (*SOURCES, *INSTRUCTIONS, *TARGETS)
    elif CONVERSATIONS in names:
        own = (CONVERSATIONS, "image", "images", "video", "audio")
    elif "parts" in names:
        own = ("parts", "images")
    else:
        # Pictures that no form has beside others are read, too, so that they are refused.
        own = (*[name for name in _PAIR if name in names][:1], "images")
    if not any(name in names for name in own):
        return []
    return [name for name in names if name in own or name in _BESIDE]


def _read_group(file: Any, *, group: int, columns: Sequence[str], arrow: Any) -> Iterator[Any]:
    """The bytes of each text in a row group, or with ``columns`` their values; a row whose text is
    not UTF-8 is the error that says so."""
    for batch in file.iter_batches(
        batch_size=_PICTURE_ROWS if columns else _TEXT_ROWS,
        row_groups=[group],
        columns=list(columns) or [_TEXT],
        use_threads=False,
    ):
        if not columns:
            # As bytes, so that one text that is not UTF-8 does not take its batch with it.
            yield from batch.column(0).cast(arrow.large_binary()).to_pylist()
            continue
        for row in range(batch.num_rows):
            try:
                (value,) = batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError as error:
                value = error
            yield value


def _schema_problem(schema: Any, *, types: Any) -> str | None:
    names: list[str] = schema.names
    if names.count(_TEXT) != 1:
        return (
            f"needs one column {_TEXT!r}, has the columns {names}; rename the one that holds text "
            "(pictures are read from the columns image, images and texts, parts, conversations, "
            "jpg, or those of edits)"
        )
    kind = schema.field(_TEXT).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if types.is_null(kind) or any(getattr(types, f"is_{name}")(kind) for name in kinds):
        return None
    return f"column {_TEXT!r} holds {kind}, not text; write it as strings"


def _record(value: Any, *, place: Place) -> RawRecord | Reject:
    if isinstance(value, dict):
        return read_row(cast(dict[str, Any], value), place=place)
    if isinstance(value, UnicodeDecodeError):
        return Reject(
            id=place.id, reason=Reason.bad_encoding, detail=str(value), offset=place.offset
        )
    if value is None:
        return Reject(id=place.id, reason=Reason.empty, detail="no text", offset=place.offset)
    return text_record(id=place.id, data=value, offset=place.offset)
