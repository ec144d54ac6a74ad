"""Folders: pictures with a caption in a ``.txt`` of the same name, or under ``caption`` of a
``.json`` (img2dataset writes both), or text files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from emu35.data.readers.records import (
    Captions,
    RawRecord,
    Reason,
    Reject,
    pair_record,
    text_record,
)
from emu35.data.readers.webdataset import LARGEST_MEMBER, PICTURES, caption_of

TEXTS = ("txt", "md")

SIDES = (".txt", ".json")
"""Endings of what lies beside a picture and tells of it."""


def extension(path: Path) -> str:
    """Lower-case, without the dot."""
    return path.suffix[1:].lower()


def list_files(folder: Path) -> list[Path]:
    """All files below ``folder`` in a fixed order, hidden ones left out."""
    # A dangling link is listed, so that it becomes a reject rather than vanish.
    found = (path for path in folder.rglob("*") if not path.is_dir())
    visible = (
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return sorted(visible, key=lambda path: path.relative_to(folder).as_posix())


def file_size(path: Path) -> int:
    """Bytes; 0 for a file that is gone or a dangling link."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def read_picture_folder(folder: Path) -> Iterator[RawRecord | Reject]:
    """One record a picture; a caption without a picture is a reject."""
    files = list_files(folder)
    stems = {path.with_suffix("") for path in files if extension(path) in PICTURES}
    offset = 0
    for path in files:
        offset += file_size(path)
        name = path.relative_to(folder).as_posix()
        if extension(path) in PICTURES:
            yield _read_pair(path, name=name, offset=offset)
        elif extension(path) == "txt" and path.with_suffix("") not in stems:
            yield Reject(id=name, reason=Reason.no_picture, offset=offset)


def read_pictures(
    paths: Sequence[Path], *, folder: Path, captions: Captions
) -> Iterator[RawRecord | Reject]:
    """One record for each of these pictures below ``folder``."""
    offset = 0
    for path in paths:
        offset += file_size(path)
        name = path.relative_to(folder).as_posix()
        yield _read_pair(path, name=name, offset=offset, captions=captions)


def _read_pair(
    path: Path, *, name: str, offset: int, captions: Captions = Captions.required
) -> RawRecord | Reject:
    sides = {ending[1:]: path.with_suffix(ending) for ending in SIDES}
    try:
        caption, fields = caption_of(
            {kind: side.read_bytes() for kind, side in sides.items() if side.exists()}
        )
    except UnicodeDecodeError as error:
        return Reject(id=name, reason=Reason.bad_encoding, detail=str(error), offset=offset)
    except (ValueError, RecursionError) as error:
        return Reject(id=name, reason=Reason.bad_json, detail=str(error), offset=offset)
    except OSError as error:
        return _unreadable(error, name=name, offset=offset)
    if file_size(path) > LARGEST_MEMBER:
        detail = f"the limit is {LARGEST_MEMBER} bytes"
        return Reject(id=name, reason=Reason.too_large, detail=detail, offset=offset)
    return pair_record(
        id=name, caption=caption, picture=path, offset=offset, fields=fields, captions=captions
    )


def read_text_folder(folder: Path) -> Iterator[RawRecord | Reject]:
    """One record a text file."""
    offset = 0
    for path in list_files(folder):
        if extension(path) in TEXTS:
            offset += file_size(path)
            yield _read_text(path, name=path.relative_to(folder).as_posix(), offset=offset)


def read_text_file(path: Path) -> Iterator[RawRecord | Reject]:
    """The whole file as one record."""
    yield _read_text(path, name=path.name, offset=file_size(path))


def _read_text(path: Path, *, name: str, offset: int) -> RawRecord | Reject:
    try:
        return text_record(id=name, data=path.read_bytes(), offset=offset)
    except OSError as error:
        return _unreadable(error, name=name, offset=offset)


def _unreadable(error: OSError, *, name: str, offset: int) -> Reject:
    detail = error.strerror or str(error)
    return Reject(id=name, reason=Reason.missing_file, detail=detail, offset=offset)


def read_text_lines(path: Path) -> Iterator[RawRecord | Reject]:
    """One record a line; blank lines only separate."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            offset += len(line)
            if line.strip():
                yield text_record(
                    id=f"{path.name}:{number}", data=line.rstrip(b"\r\n"), offset=offset
                )
