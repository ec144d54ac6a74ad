"""Parquet files with a column ``text``, where pyarrow is installed."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emu35.data.readers.records import RawRecord, Reason, Reject, text_record
from emu35.errors import DataError

_COLUMN = "text"


def read_parquet(path: Path) -> Iterator[RawRecord | Reject]:
    """One record a row.

    Raises:
        DataError: if pyarrow is not installed or the file has no column ``text``.
    """
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
        arrow: Any = importlib.import_module("pyarrow")
    except ImportError as error:
        raise DataError(
            f"reading {path} needs pyarrow, which is not installed; "
            "run `pip install pyarrow` or convert the file to JSON lines"
        ) from error
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        yield Reject(id=path.name, reason=Reason.damaged_input, detail=str(error))
        return
    names: list[str] = file.schema_arrow.names
    if _COLUMN not in names:
        raise DataError(f"{path} has no column {_COLUMN!r}, only {names}; rename the text column")
    size = path.stat().st_size
    rows, total = 0, max(file.metadata.num_rows, 1)
    for batch in file.iter_batches(columns=[_COLUMN]):
        for value in batch.column(0).to_pylist():
            rows += 1
            name, offset = f"{path.name}:{rows}", size * rows // total
            if isinstance(value, str):
                yield text_record(id=name, data=value, offset=offset)
            else:
                yield Reject(id=name, reason=Reason.empty, detail="no text", offset=offset)
