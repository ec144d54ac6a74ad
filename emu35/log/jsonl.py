"""``metrics.jsonl``: the record of a run, one JSON object a line."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emu35.errors import Emu35Error
from emu35.files import write_atomically

Row = Mapping[str, float | int | None]
_COUNTS = ("step", "tokens", "tokens_total", "skipped_steps")


def null_safe(values: Mapping[str, Any]) -> dict[str, float | int | None]:
    """Plain numbers fit for strict JSON: NaN and infinities become None, counts become int."""
    row: dict[str, float | int | None] = {}
    for name, value in values.items():
        number = math.nan if value is None else float(value)
        if not math.isfinite(number):
            row[name] = None
        else:
            row[name] = int(number) if name in _COUNTS else number
    return row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every whole row of a metrics file, in order; torn or foreign lines are left out."""
    if not path.exists():
        return []
    return [row for row, _ in _parse(path.read_bytes())[0]]


class MetricsFile:
    """Appends rows; opening it for a resumed run first removes what the run will write again.

    Args:
        path: of ``metrics.jsonl``; its folder is made if needed.
        start_step: rows of later steps belong to work that was lost, and are cut.
        warn: told, in one sentence, about repairs and about a disk that refuses to write.

    Raises:
        Emu35Error: the file cannot be opened for writing at all.
    """

    def __init__(self, *, path: Path, start_step: int, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._pending = b""
        self._refused = False
        self._validated: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._repair(start_step)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise Emu35Error(
                f"cannot write {path}: {error.strerror}; free space there or choose another run_dir"
            ) from error

    def write(self, row: Row) -> None:
        """Append ``row`` whole, or keep it until the disk takes it.

        A validation made again after a resume, of the very step the file ends with, is not
        repeated: validation is deterministic, so it is there already.
        """
        if is_validation(row):
            if row["step"] == self._validated:
                return
            self._validated = int(row["step"] or 0)
        self._pending += json.dumps(null_safe(row), allow_nan=False).encode() + b"\n"
        self._drain()

    def flush(self) -> None:
        """Make every row so far survive a crash of the machine."""
        self._drain()
        try:
            os.fsync(self._file)
        except OSError as error:
            self._complain(error)

    def close(self) -> None:
        self.flush()
        os.close(self._file)
        if lost := self._pending.count(b"\n"):
            self._warn(f"{self._path}: the last {lost} row(s) could not be written")

    def _drain(self) -> None:
        if not self._pending:
            return
        size = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(self._pending):  # a nearly full disk takes part of a write
                written += os.write(self._file, self._pending[written:])
        except OSError as error:
            os.ftruncate(self._file, size)  # no half row may stay in front of the next one
            self._complain(error)
            return
        self._pending, self._refused = b"", False

    def _complain(self, error: OSError) -> None:
        if not self._refused:
            self._warn(f"cannot write {self._path} ({error.strerror}); rows are kept in memory")
        self._refused = True

    def _repair(self, start_step: int) -> None:
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        rows, torn = _parse(content)
        kept = [line for row, line in rows if row["step"] <= start_step]
        self._validated = max(
            (row["step"] for row, _ in rows if row["step"] <= start_step and is_validation(row)),
            default=None,
        )
        if torn:
            self._warn(f"{self._path.name}: removed {torn} damaged line(s)")
        if not torn and len(kept) == len(rows) and content.endswith(b"\n"):
            return
        write_atomically(self._path, content=b"".join(line + b"\n" for line in kept))


def is_validation(row: Row) -> bool:
    """Whether a row reports a validation rather than a training step."""
    return any(key.startswith("val/") for key in row)


def _parse(content: bytes) -> tuple[list[tuple[dict[str, Any], bytes]], int]:
    """The rows of ``content``, each with its line, and how many lines are not a row."""
    rows: list[tuple[dict[str, Any], bytes]] = []
    damaged = 0
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # also covers bytes that are not UTF-8
            damaged += 1
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append((row, line))
        else:
            damaged += 1
    return rows, damaged
