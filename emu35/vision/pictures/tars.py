"""What a tar of pictures holds, from its headers: names, offsets and sizes.

Webdataset's layout: members that share a key (the name up to the first dot of its last part) and
follow each other belong together, pictures and the JSON that tells about them. Names with more dots
(``1.5.png``, ``1.7.png``) share a key and are still pictures of their own, so the JSON of a picture
is that of its own name, and only without one that of the key. Members whose last part begins with a
dot are left out.
"""

import tarfile
from collections.abc import Iterator, MutableMapping, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from emu35.errors import DataError

METADATA = ".json"
"""Suffix of what tells about the picture of the same name."""

NO_METADATA = -1
"""Size of the metadata of a picture that has none."""


@dataclass(kw_only=True, slots=True)
class Entry:
    """A picture, and where its metadata lie, if ``metadata_size`` is not NO_METADATA."""

    name: str
    offset: int
    size: int
    metadata_offset: int = 0
    metadata_size: int = NO_METADATA


def read_entries(
    path: Path, *, suffixes: Set[str], rejects: MutableMapping[str, str]
) -> Iterator[Entry]:
    """Members of an uncompressed tar whose name ends in one of ``suffixes``, as far as its headers
    can be read; where they break off, that is the reason in ``rejects``.

    Raises:
        DataError: not even the first header can be read.
    """
    found = 0
    try:
        with path.open("rb") as file:
            for record in _records(file):
                for entry in _pictures_of(record, suffixes=suffixes):
                    found += 1
                    yield entry
            _check_end(file)
    except (tarfile.TarError, OSError) as error:
        if not found:
            raise DataError(
                f"{path} cannot be read as an uncompressed tar ({error}); copy or pack it again"
            ) from error
        rejects[str(path)] = f"tar ends early, after {found} pictures: {error}"


def _records(file: IO[bytes]) -> Iterator[list[tarfile.TarInfo]]:
    """Runs of files with the same key; leaves ``file`` where the headers end."""
    key, record = "", list[tarfile.TarInfo]()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                # The list of members would otherwise grow with the tar.
                cast(Any, tar).members = []
                if not member.isfile():
                    continue
                if record and key_of(member.name) != key:
                    yield record
                    record = []
                key = key_of(member.name)
                record.append(member)
            file.seek(tar.offset)
    except (tarfile.TarError, OSError):
        if record:
            yield record  # what came before the break is still good
        raise
    if record:
        yield record


def key_of(name: str) -> str:
    """``a/b.c.jpg`` -> ``a/b``."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _pictures_of(record: list[tarfile.TarInfo], *, suffixes: Set[str]) -> Iterator[Entry]:
    json = {
        member.name[: -len(METADATA)]: member
        for member in record
        if member.name.lower().endswith(METADATA)
    }
    for member in record:
        path = PurePosixPath(member.name)
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        stem = member.name[: -len(path.suffix)]
        metadata = json.get(stem) or json.get(key_of(member.name))
        yield Entry(
            name=member.name,
            offset=member.offset_data,
            size=member.size,
            metadata_offset=metadata.offset_data if metadata else 0,
            metadata_size=metadata.size if metadata else NO_METADATA,
        )


def _check_end(file: IO[bytes]) -> None:
    """A damaged header in the middle passes for the end of a tar; the real end is a block of zeros,
    or, where a writer left that out, the end of the file."""
    block = file.read(tarfile.BLOCKSIZE)
    if any(block):
        raise tarfile.ReadError(f"no header at byte {file.tell() - len(block)}")
