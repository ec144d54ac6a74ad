"""Which reader an input path belongs to."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

from emu35.data.readers.folder import (
    TEXTS,
    extension,
    file_size,
    list_files,
    read_picture_folder,
    read_text_file,
    read_text_folder,
    read_text_lines,
)
from emu35.data.readers.jsonl import read_jsonl
from emu35.data.readers.parquet import load_pyarrow, read_parquet
from emu35.data.readers.records import RawRecord, Reject
from emu35.data.readers.task_documents import Starts
from emu35.data.readers.webdataset import PICTURES, read_webdataset
from emu35.errors import DataError

_TARS = (".tar", ".tar.gz", ".tgz")
_JSON_LINES = (".jsonl", ".ndjson")
_PARQUET = (".parquet",)
_EDGE_BYTES = 64 * 1024


class TextUnit(StrEnum):
    """What is one document in a text file: the whole ``file``, or each of its ``lines``."""

    file = "file"
    lines = "lines"


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """One unit of ingestion: a file, or a folder read as a whole.

    ``size`` is in bytes; ``fingerprint`` changes with the size or the edges of a file, and with
    the names or sizes in a folder.
    """

    path: Path
    size: int
    fingerprint: str
    reader: Callable[[Path], Iterator[RawRecord | Reject]]

    @property
    def is_of_pictures(self) -> bool:
        """Whether records of this form always hold a picture; other forms may."""
        return self.reader in (read_webdataset, read_picture_folder)

    def read(self) -> Iterator[RawRecord | Reject]:
        """All records, in order."""
        return self.reader(self.path)


def find_inputs(
    paths: Sequence[Path], *, text_unit: TextUnit, starts: Starts = Starts.random
) -> list[InputFile]:
    """Resolve files and folders into inputs; task records in JSON lines heed ``starts``.

    A folder stands for its tars if it holds any at its top (img2dataset writes parquet and JSON
    files beside them, which are not data), else for its JSON lines files, else its parquet files,
    else for the pictures below it, else for the text files below it.

    Raises:
        DataError: if a path does not exist, is of no known kind, is given twice, or is a parquet
            file where pyarrow is not installed.
    """
    found: list[InputFile] = []
    for path in paths:
        if path.is_dir():
            found.extend(_from_folder(path.resolve(), text_unit=text_unit, starts=starts))
        elif path.is_file():
            found.append(_from_file(path.resolve(), text_unit=text_unit, starts=starts))
        else:
            raise DataError(f"input {path} does not exist; give files or folders that do")
    seen: set[Path] = set()
    for entry in found:
        if entry.path in seen:
            raise DataError(f"input {entry.path} is given twice; give each input once")
        seen.add(entry.path)
    return found


def _from_file(path: Path, *, text_unit: TextUnit, starts: Starts) -> InputFile:
    name = path.name.lower()
    lines = text_unit is TextUnit.lines
    reader: Callable[[Path], Iterator[RawRecord | Reject]]
    if name.endswith(_TARS):
        reader = read_webdataset
    elif name.endswith(_JSON_LINES):
        reader = partial(read_jsonl, starts=starts)
    elif name.endswith(_PARQUET):
        load_pyarrow(path)
        reader = read_parquet
    elif extension(path) in TEXTS:
        reader = read_text_lines if lines else read_text_file
    else:
        raise DataError(
            f"input {path} is of no known kind; give .tar, .jsonl, .parquet, .txt or .md files, "
            "or a folder of pictures with captions or of text files"
        )
    return InputFile(
        path=path, size=path.stat().st_size, fingerprint=_file_fingerprint(path), reader=reader
    )


def _from_folder(folder: Path, *, text_unit: TextUnit, starts: Starts) -> list[InputFile]:
    top = sorted(path for path in folder.iterdir() if path.is_file())
    for endings in (_TARS, _JSON_LINES, _PARQUET):
        files = [path for path in top if path.name.lower().endswith(endings)]
        if files:
            return [_from_file(path, text_unit=text_unit, starts=starts) for path in files]
    below = list_files(folder)
    texts = [path for path in below if extension(path) in TEXTS]
    if any(extension(path) in PICTURES for path in below):
        return [_as_folder(folder, files=below, reader=read_picture_folder)]
    if not texts:
        raise DataError(
            f"folder {folder} holds nothing to ingest; it needs tars, JSON lines, parquet files, "
            "pictures or text files"
        )
    if text_unit is TextUnit.lines:
        return [_from_file(path, text_unit=text_unit, starts=starts) for path in texts]
    return [_as_folder(folder, files=texts, reader=read_text_folder)]


def _as_folder(
    folder: Path,
    *,
    files: Sequence[Path],
    reader: Callable[[Path], Iterator[RawRecord | Reject]],
) -> InputFile:
    sha = hashlib.sha256()
    size = 0
    for path in files:
        length = file_size(path)
        size += length
        sha.update(os.fsencode(path.relative_to(folder)) + f"\0{length}\n".encode())
    return InputFile(path=folder, size=size, fingerprint=sha.hexdigest(), reader=reader)


def _file_fingerprint(path: Path) -> str:
    # Not the whole file: inputs may be terabytes, and a rerun only asks "is this the same file?".
    size = path.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        sha.update(file.read(_EDGE_BYTES))
        if size > _EDGE_BYTES:
            file.seek(max(_EDGE_BYTES, size - _EDGE_BYTES))
            sha.update(file.read())
    return sha.hexdigest()
