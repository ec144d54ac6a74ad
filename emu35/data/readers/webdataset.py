"""Webdataset tars of pictures and captions, as img2dataset writes them.

Members that share a key (the name up to the first dot of its last part) are one record: a picture
(see :data:`PICTURES`) and a caption (``txt``, or the field ``caption`` of ``json``). What
``emu35 data tokenize`` wrote has the codes of a picture in its place (``codes.npy``), and in the
field :data:`TOKENIZED` of its ``json`` whose codes they are.

What a record does not need, such as masks and embeddings beside the picture, is left alone. What
may be a record that cannot be read is named: keys of which no member is known, pictures whose names
hide their ending behind further dots, links.

A gap in the middle of a damaged tar cannot be told from its end: everything before it is kept, and
the reject names the byte where the tar breaks off.
"""

import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from emu35.data.codes.grid import EXTENSION
from emu35.data.readers.named_pictures import PICTURE_FILES
from emu35.data.readers.records import (
    Captions,
    RawCodes,
    RawRecord,
    Reason,
    Reject,
    pair_record,
)

PICTURES = PICTURE_FILES
TOKENIZED = "tokenized"
"""Field of a record's JSON for what its codes are; the others are those of the picture."""
_KINDS = (*PICTURES, EXTENSION, "txt", "json")
LARGEST_MEMBER = 256 * 2**20

Members = dict[str, bytes]


def read_webdataset(
    path: Path, *, captions: Captions = Captions.required
) -> Iterator[RawRecord | Reject]:
    """Records of a tar, which may be gzipped; a damaged tar ends in a reject that says so."""
    compressed = path.name.endswith((".gz", ".tgz"))
    opener = gzip.open if compressed else open
    try:
        with opener(path, "rb") as raw:
            file = cast(IO[bytes], raw)
            yield from _read_members(file, captions=captions)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        yield Reject(
            id=path.name, reason=Reason.damaged_input, detail=f"the tar breaks off: {error}"
        )


def _read_members(file: IO[bytes], *, captions: Captions) -> Iterator[RawRecord | Reject]:
    key: str | None = None
    skipped: str | None = None
    members: Members = {}
    unused: list[str] = []
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            # The list of members would otherwise grow with the tar.
            cast(Any, tar).members = []
            name, extension = split_key(member.name)
            if member.islnk() or member.issym():
                yield _link(member)
            if not member.isreg() or name is None or name == skipped:
                continue
            if name != key or extension in members:
                if key is not None:
                    yield from _finish(
                        key, members, unused=unused, offset=member.offset, captions=captions
                    )
                key, members, unused = name, {}, []
            if extension not in _KINDS:
                unused.append(member.name)
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
            yield from _finish(key, members, unused=unused, offset=tar.offset, captions=captions)
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


def _link(member: tarfile.TarInfo) -> Reject:
    return Reject(
        id=member.name,
        reason=Reason.is_link,
        detail=f"a link to {member.linkname}; write the tar with --dereference --hard-dereference",
        offset=member.offset,
    )


def _why_no_picture(unused: Sequence[str]) -> str:
    """What to say of a record without one, given its members that are of no known kind."""
    if not unused:
        return ""
    if hidden := [name for name in unused if name.lower().rpartition(".")[2] in PICTURES]:
        return (
            f"{hidden[0]} is none, because the key of a member ends at its first dot; let no other "
            "dot stand before the ending"
        )
    return f"{unused[0]} is of no kind that is read ({', '.join(_KINDS)})"


def _finish(
    key: str, members: Members, *, unused: Sequence[str], offset: int, captions: Captions
) -> Iterator[RawRecord | Reject]:
    picture: bytes | RawCodes | None = next(
        (members[kind] for kind in PICTURES if kind in members), None
    )
    try:
        caption, fields = caption_of(members)
        if EXTENSION in members:
            key, picture = _codes_of(members[EXTENSION], fields=fields)
            fields = {name: value for name, value in fields.items() if name != TOKENIZED}
    except _NoCodes as error:
        yield Reject(id=key, reason=Reason.bad_codes, detail=str(error), offset=offset)
    except UnicodeDecodeError as error:
        yield Reject(id=key, reason=Reason.bad_encoding, detail=str(error), offset=offset)
    except (ValueError, RecursionError) as error:
        yield Reject(id=key, reason=Reason.bad_json, detail=str(error), offset=offset)
    else:
        yield pair_record(
            id=key,
            caption=caption,
            picture=picture,
            offset=offset,
            fields=fields,
            captions=captions,
            why_none=_why_no_picture(unused),
        )


class _NoCodes(Exception):
    """Codes of which nobody knows whose they are."""


def _codes_of(data: bytes, *, fields: dict[str, Any]) -> tuple[str, RawCodes]:
    """The id of the picture that was encoded, and its codes. Raises: _NoCodes."""
    found = fields.get(TOKENIZED)
    if not isinstance(found, dict):
        raise _NoCodes(f"its json has no {TOKENIZED!r}, which names the image tokenizer")
    facts = cast(dict[str, Any], found)
    kinds = {"id": str, "tokenizer": str, "dtype": str, "codebook_size": int}
    wrong = [name for name, kind in kinds.items() if type(facts.get(name)) is not kind]
    if wrong:
        raise _NoCodes(f"{TOKENIZED}.{wrong[0]} of its json is {facts.get(wrong[0])!r}")
    return facts["id"], RawCodes(
        data=data,
        tokenizer=facts["tokenizer"],
        dtype=facts["dtype"],
        codebook_size=facts["codebook_size"],
    )


def caption_of(members: Members) -> tuple[str | None, dict[str, Any]]:
    """The caption of a picture and the fields of its JSON, from ``txt`` and ``json`` beside it.

    Raises:
        UnicodeDecodeError: the caption is not UTF-8.
        ValueError, RecursionError: the JSON that would have to hold it is none.
    """
    fields: dict[str, Any] = {}
    if "json" in members:
        try:
            fields = _read_json(members["json"])
        except (ValueError, RecursionError):
            # A caption in a file of its own makes the record without it.
            if "txt" not in members:
                raise
    if "txt" in members:
        return members["txt"].decode("utf-8-sig"), fields
    caption = fields.get("caption")
    return (caption if isinstance(caption, str) else None), fields


def _read_json(data: bytes) -> dict[str, Any]:
    facts: Any = json.loads(data.decode("utf-8-sig"))
    return cast(dict[str, Any], facts) if isinstance(facts, dict) else {}
