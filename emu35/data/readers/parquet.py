"""Parquet files with a column ``text``; reading them needs the extra ``parquet``."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emu35.data.readers.records import RawRecord, Reason, Reject, text_record
from emu35.errors import DataError

_COLUMN = "text"
# Rows held at a time: rows may be whole books.
_BATCH_ROWS = 4096


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


def read_parquet(path: Path) -> Iterator[RawRecord | Reject]:
    """One record a row.

    A damaged part of the file is a reject that names the rows lost with it; the row groups after it
    are still read. A file without a column of text is one reject.

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
        problem = _schema_problem(file.schema_arrow, types=arrow.types)
        if problem is not None:
            yield Reject(id=path.name, reason=Reason.bad_record, detail=problem)
            return
        size = path.stat().st_size
        first, total = 0, max(file.metadata.num_rows, 1)
        for group in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            row = first
            try:
                for text in _read_group(file, group=group, binary=arrow.large_binary()):
                    row += 1
                    yield _record(text, id=f"{path.name}:{row}", offset=size * row // total)
            except damage as error:
                yield Reject(
                    id=f"{path.name}:{row + 1}-{end}",
                    reason=Reason.damaged_input,
                    detail=f"these {end - row} rows cannot be read: {error}",
                    offset=size * end // total,
                )
            first = end


def _read_group(file: Any, *, group: int, binary: Any) -> Iterator[bytes | None]:
    """The bytes of each text in a row group."""
    for batch in file.iter_batches(
        batch_size=_BATCH_ROWS, row_groups=[group], columns=[_COLUMN], use_threads=False
    ):
        # As bytes, so that one text that is not UTF-8 does not take its batch with it.
        yield from batch.column(0).cast(binary).to_pylist()


def _schema_problem(schema: Any, *, types: Any) -> str | None:
    names: list[str] = schema.names
    if names.count(_COLUMN) != 1:
        return (
            f"needs one column {_COLUMN!r}, has the columns {names}; rename the one that holds text"
        )
    kind = schema.field(_COLUMN).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if types.is_null(kind) or any(getattr(types, f"is_{name}")(kind) for name in kinds):
        return None
    return f"column {_COLUMN!r} holds {kind}, not text; write it as strings"


def _record(text: bytes | None, *, id: str, offset: int) -> RawRecord | Reject:
    if text is None:
        return Reject(id=id, reason=Reason.empty, detail="no text", offset=offset)
    return text_record(id=id, data=text, offset=offset)
