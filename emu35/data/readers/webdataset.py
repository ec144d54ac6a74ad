"""Webdataset tars of pictures and captions, as img2dataset writes them.

Members that share a key (the name up to the first dot of its last part) are one record: a picture
(see :data:`PICTURES`) and a caption (``txt``, or the field ``caption`` of ``json``).
"""

import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from emu35.data.readers.records import RawRecord, Reason, Reject, pair_record

PICTURES = ("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff")
_CAPTIONS = ("txt", "json")
LARGEST_MEMBER = 256 * 2**20

Members = dict[str, bytes]


def read_webdataset(path: Path) -> Iterator[RawRecord | Reject]:
    """Records of a tar, which may be gzipped; a damaged tar ends in a reject that says so."""
    compressed = path.name.endswith((".gz", ".tgz"))
    opener = gzip.open if compressed else open
    try:
        with opener(path, "rb") as raw:
            file = cast(IO[bytes], raw)
            yield from _read_members(file)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        yield Reject(
            id=path.name, reason=Reason.damaged_input, detail=f"the tar breaks off: {error}"
        )


def _read_members(file: IO[bytes]) -> Iterator[RawRecord | Reject]:
    key: str | None = None
    skipped: str | None = None
    members: Members = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            # The list of members would otherwise grow with the tar.
            cast(Any, tar).members = []
            name, extension = split_key(member.name)
            if not member.isreg() or name is None or name == skipped:
                continue
            if name != key:
                if key is not None:
                    yield from _finish(key, members, offset=member.offset)
                key, members = name, {}
            if extension not in (*PICTURES, *_CAPTIONS):
                continue
            if member.size > LARGEST_MEMBER:
                yield Reject(
                    id=name,
                    reason=Reason.too_large,
                    detail=f"{member.name} has {member.size} bytes; the limit is {LARGEST_MEMBER}",
                    offset=member.offset,
                )
                key, skipped = None, name
                continue
            data = tar.extractfile(member)
            assert data is not None
            members[extension] = data.read()
        if key is not None:
            yield from _finish(key, members, offset=tar.offset)
        # tarfile takes a damaged header for the end of the archive and says nothing.
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) != tarfile.BLOCKSIZE or any(block):
            yield Reject(
                id=f"byte {tar.offset}",
                reason=Reason.damaged_input,
                detail="the tar has no end mark there; whatever followed was lost",
                offset=tar.offset,
            )


def split_key(name: str) -> tuple[str | None, str]:
    """Key and lower-case extension of a member name; no key for names without an extension."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem or name.startswith("__"):
        return None, ""
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _finish(key: str, members: Members, *, offset: int) -> Iterator[RawRecord | Reject]:
    if not members:
        return
    picture = next((members[kind] for kind in PICTURES if kind in members), None)
    try:
        caption = _caption(members)
    except UnicodeDecodeError as error:
        yield Reject(id=key, reason=Reason.bad_encoding, detail=str(error), offset=offset)
    except (ValueError, RecursionError) as error:
        yield Reject(id=key, reason=Reason.bad_json, detail=str(error), offset=offset)
    else:
        yield pair_record(id=key, caption=caption, picture=picture, offset=offset)


def _caption(members: Members) -> str | None:
    if "txt" in members:
        return members["txt"].decode("utf-8-sig")
    if "json" in members:
        facts: Any = json.loads(members["json"].decode("utf-8-sig"))
        if isinstance(facts, dict):
            caption: Any = cast(dict[str, Any], facts).get("caption")
            return caption if isinstance(caption, str) else None
    return None
