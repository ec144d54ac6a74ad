"""Which reader an input path belongs to."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

from emu35.data.readers.benchmarks import BENCHMARKS, Layout
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
from emu35.data.readers.jsonl import read_json_list, read_jsonl
from emu35.data.readers.parquet import load_pyarrow, read_parquet
from emu35.data.readers.records import RawRecord, Reject
from emu35.data.readers.task_documents import Starts
from emu35.data.readers.webdataset import PICTURES, read_webdataset
from emu35.errors import DataError

TARS = (".tar", ".tar.gz", ".tgz")
_JSON_LINES = (".jsonl", ".ndjson")
_JSON = (".json",)
_STATS = "_stats.json"
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
    the names or sizes in a folder (and times where a folder is read by stretches, of what lies
    beside its pictures).
    """

    path: Path
    size: int
    fingerprint: str
    reader: Callable[[Path], Iterator[RawRecord | Reject]]

    @property
    def is_of_pictures(self) -> bool:
        """Whether records of this form always hold a picture; other forms may."""
        return self.reader in (read_webdataset, read_picture_folder, *BENCHMARKS.values())

    def read(self) -> Iterator[RawRecord | Reject]:
        """All records, in order."""
        return self.reader(self.path)


def find_inputs(
    paths: Sequence[Path],
    *,
    text_unit: TextUnit,
    starts: Starts = Starts.random,
    layout: Layout | None = None,
    pictures: Path | None = None,
    fields: Sequence[str] = (),
) -> list[InputFile]:
    """Resolve files and folders into inputs; task records in JSON lines heed ``starts``.

    A folder stands for its tars if it holds any at its top, else for its JSON lines files, else its
    parquet files, else its JSON lists, else for the pictures below it, else for the text files
    below it. What img2dataset writes about a shard, beside the tar, folder or parquet file that
    holds it (``00000.parquet``, ``00000_stats.json``), is no input, named or not.

    With ``layout`` every path is that benchmark's JSON file, or the folder that holds it.
    ``pictures`` is where relative picture paths in records start, if not at the folder of their
    file; ``fields`` are columns of parquet files that records shall have besides those of a form.

    Raises:
        DataError: if a path does not exist, is of no known kind, is given twice, or is a parquet
            file where pyarrow is not installed.
    """
    found: list[InputFile] = []
    kinds = _Kinds(text_unit=text_unit, starts=starts, pictures=pictures, fields=tuple(fields))
    for path in paths:
        if layout is not None and path.exists():
            found.append(_benchmark(path.resolve(), layout=layout))
        elif path.is_dir():
            found.extend(kinds.of_folder(path.resolve()))
        elif path.is_file():
            if not is_report(path.resolve()):
                found.append(kinds.of_file(path.resolve()))
        else:
            raise DataError(f"input {path} does not exist; give files or folders that do")
    refuse_repeats(found)
    return found


def refuse_repeats(inputs: Sequence[InputFile]) -> None:
    """Raises: DataError if one of them is there twice."""
    seen: set[Path] = set()
    for entry in inputs:
        if entry.path in seen:
            raise DataError(f"input {entry.path} is given twice; give each input once")
        seen.add(entry.path)


def _benchmark(path: Path, *, layout: Layout) -> InputFile:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if extension(file) in ("json", "jsonl"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise DataError(
                f"folder {path} does not hold one JSON file but {names}; give the file with the "
                f"items of {layout}"
            )
        (path,) = files
    return InputFile(
        path=path,
        size=path.stat().st_size,
        fingerprint=file_fingerprint(path),
        reader=BENCHMARKS[layout],
    )


def is_report(path: Path) -> bool:
    """Whether img2dataset wrote it about a shard whose pictures lie elsewhere."""
    name = path.name
    if name.endswith(_STATS):
        stem = path.with_name(name.removesuffix(_STATS))
        return any(stem.with_name(stem.name + end).exists() for end in (".tar", ".parquet", ""))
    if not name.endswith(_PARQUET):
        return False
    stem = path.with_suffix("")
    return stem.with_name(f"{stem.name}.tar").is_file() or (
        stem.is_dir() and stem.with_name(stem.name + _STATS).is_file()
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kinds:
    """How files of each kind are read; see :func:`find_inputs`."""

    text_unit: TextUnit
    starts: Starts
    pictures: Path | None
    fields: tuple[str, ...]

    def of_file(self, path: Path) -> InputFile:
        """Raises: DataError."""
        name = path.name.lower()
        reader: Callable[[Path], Iterator[RawRecord | Reject]]
        if name.endswith(TARS):
            reader = read_webdataset
        elif name.endswith(_JSON_LINES):
            reader = partial(read_jsonl, starts=self.starts, pictures=self.pictures)
        elif name.endswith(_JSON):
            reader = partial(read_json_list, starts=self.starts, pictures=self.pictures)
        elif name.endswith(_PARQUET):
            load_pyarrow(path)
            reader = partial(
                read_parquet, starts=self.starts, pictures=self.pictures, beside=self.fields
            )
        elif extension(path) in TEXTS:
            reader = read_text_lines if self.text_unit is TextUnit.lines else read_text_file
        else:
            raise DataError(
                f"input {path} is of no known kind; give .tar, .jsonl, .json, .parquet, .txt or "
                ".md files, or a folder of pictures with captions or of text files"
            )
        return InputFile(
            path=path, size=path.stat().st_size, fingerprint=file_fingerprint(path), reader=reader
        )

    def of_folder(self, folder: Path) -> list[InputFile]:
        """Raises: DataError."""
        top = sorted(path for path in folder.iterdir() if path.is_file() and not is_report(path))
        for endings in (TARS, _JSON_LINES, _PARQUET, _JSON):
            files = [path for path in top if path.name.lower().endswith(endings)]
            if endings is _JSON:
                files = [path for path in files if _is_list(path)]
            if files:
                return [self.of_file(path) for path in files]
        below = list_files(folder)
        texts = [path for path in below if extension(path) in TEXTS]
        if any(extension(path) in PICTURES for path in below):
            return [as_folder(folder, files=below, reader=read_picture_folder)]
        if not texts:
            raise DataError(
                f"folder {folder} holds nothing to ingest; it needs tars, JSON lines, parquet "
                "files, JSON lists, pictures or text files"
            )
        if self.text_unit is TextUnit.lines:
            return [self.of_file(path) for path in texts]
        return [as_folder(folder, files=texts, reader=read_text_folder)]


def _is_list(path: Path) -> bool:
    """Whether it begins as a JSON list does; facts about a picture are an object."""
    with path.open("rb") as file:
        return file.read(_EDGE_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def as_folder(
    folder: Path,
    *,
    files: Sequence[Path],
    reader: Callable[[Path], Iterator[RawRecord | Reject]],
    name: Path | None = None,
    beside: Sequence[Path] = (),
) -> InputFile:
    """These files below ``folder`` as one input, called ``name`` if it is not all of them. A change
    of those ``beside`` them, small files that are read with them, is seen by their times too."""
    sha = hashlib.sha256()
    size = 0
    for path in files:
        length = file_size(path)
        size += length
        sha.update(os.fsencode(path.relative_to(folder)) + f"\0{length}\n".encode())
    for path in beside:
        found = path.stat()
        facts = f"\0{found.st_size}\0{found.st_mtime_ns}\n".encode()
        sha.update(os.fsencode(path.relative_to(folder)) + facts)
    return InputFile(path=name or folder, size=size, fingerprint=sha.hexdigest(), reader=reader)


def file_fingerprint(path: Path) -> str:
    """Tells a file from another of its name."""
    # Not the whole file: inputs may be terabytes, and a rerun only asks "is this the same file?".
    size = path.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        sha.update(file.read(_EDGE_BYTES))
        if size > _EDGE_BYTES:
            file.seek(max(_EDGE_BYTES, size - _EDGE_BYTES))
            sha.update(file.read())
    return sha.hexdigest()
