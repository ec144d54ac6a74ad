"""One shard: its bytes, its index, its members, and every document in it."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emu35.data.index import checksum_of, checksum_range, read_index
from emu35.data.index_file import ShardIndex
from emu35.data.shards import BLOCK, META_MEMBER, TAIL, ShardMeta, Words, tail_digest
from emu35.data.validate.document import GridSizes, Indexed, check_document, parse_record
from emu35.data.validate.layout import (
    Bytes,
    Member,
    Place,
    Walk,
    places_from_index,
    places_from_tar,
    walk_tar,
)
from emu35.data.validate.problem import Check, Problem
from emu35.errors import DataError, TokenizerError

_CHUNK = 2**22

SizesOf = Callable[[ShardMeta], GridSizes]
"""How grid sizes are spelled by a shard's tokenizer.

Raises: ValueError or TokenizerError if there is no such tokenizer."""


@dataclass(kw_only=True, slots=True)
class ShardReport:
    """What was found in a shard; ``meta`` is None where it could not be read.

    ``names`` are hashes of the ids of the documents ``named``, to find those that occur twice.
    """

    path: Path
    bytes: int = 0
    documents: int = 0
    tokens: int = 0
    pictures: int = 0
    meta: ShardMeta | None = None
    named: list[int] = field(default_factory=list[int])
    names: list[int] = field(default_factory=list[int])
    problems: list[Problem] = field(default_factory=list[Problem])


def validate_shard(path: Path, *, sizes_of: SizesOf) -> ShardReport:
    """Read all of the shard at ``path`` and of its index; whatever is wrong is in the report."""
    check = _ShardCheck(path)
    try:
        check.run(sizes_of=sizes_of)
    except OSError as error:
        check.problem(Check.digest, f"it cannot be read: {error.strerror or error}")
    return check.report


class _ShardCheck:
    """Collects what is wrong with one shard."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.report = ShardReport(path=path)

    def problem(
        self, check: Check, text: str, *, place: Place | None = None, id: str | None = None
    ) -> None:
        self.report.problems.append(
            Problem(
                check=check,
                text=text,
                folder=self.path.parent,
                shard=self.path.name,
                document=place.row if place else None,
                key=place.key if place else None,
                id=id,
            )
        )

    def run(self, *, sizes_of: SizesOf) -> None:
        index = self._index()
        if not self.path.is_file():
            return  # which the index says as well
        size = self.path.stat().st_size
        data: Bytes = _mapped(self.path) if size else np.zeros(0, np.uint8)
        self.report.bytes = size
        self._digest(data)
        walk = walk_tar(data)
        if walk.broken:
            self.problem(Check.layout, walk.broken)
        meta = self._meta(data, walk=walk, index=index)
        self.report.meta = meta
        sizes = None if meta is None else self._sizes(meta, sizes_of=sizes_of)
        if meta is None or sizes is None:
            return
        largest = 0
        for place in self._places(walk, index=index):
            largest = max(largest, self._document(data, place, meta=meta, index=index, sizes=sizes))
        if index is not None and index.max_token != largest and not self.report.problems:
            text = f"its index says that the largest id is {index.max_token}, it is {largest}"
            self.problem(Check.sidecar, text)

    def _index(self) -> ShardIndex | None:
        try:
            return read_index(self.path)
        except DataError as error:
            self.problem(Check.sidecar, str(error))
        return None

    def _digest(self, data: Bytes) -> None:
        if len(data) % BLOCK:
            text = f"it has {len(data)} bytes, no multiple of {BLOCK}; it was cut short"
            self.problem(Check.digest, text)
        said = tail_digest(data[-TAIL:].tobytes())
        if said is None:
            self.problem(Check.digest, "it does not end like a complete token shard")
            return
        if data[BLOCK + len(said) - TAIL :].any():
            # No digest covers the padding of the digest itself.
            self.problem(Check.digest, "it holds something after its closing digest")
        sha = hashlib.sha256()
        for first in range(0, len(data) - TAIL, _CHUNK):
            # Lets other threads run: the interpreter is not needed to hash.
            sha.update(data[first : min(first + _CHUNK, len(data) - TAIL)].data)
        if sha.hexdigest() != said:
            text = (
                f"its bytes changed: their sha256 is {sha.hexdigest()[:12]}, its closing digest "
                f"says {said[:12]}"
            )
            self.problem(Check.digest, text)

    def _meta(self, data: Bytes, *, walk: Walk, index: ShardIndex | None) -> ShardMeta | None:
        """What the shard says of itself, or else its index."""
        theirs = index.meta if index else None
        member = walk.member(META_MEMBER)
        if member is None:
            self.problem(Check.layout, f"it has no {META_MEMBER}, or one that cannot be found")
            return theirs
        content = data[member.offset : member.offset + member.size].tobytes()
        try:
            meta = ShardMeta.from_json(content.decode())
            meta.vocabulary()
        except (ValueError, KeyError, TypeError, AttributeError, TokenizerError) as error:
            text = f"its {META_MEMBER} cannot be read ({error!r})"
            self.problem(Check.layout, text)
            return theirs
        if theirs is not None and theirs != meta:
            text = f"its index says that it is {theirs}, it says that it is {meta}"
            self.problem(Check.sidecar, text)
        return theirs or meta

    def _sizes(self, meta: ShardMeta, *, sizes_of: SizesOf) -> GridSizes | None:
        try:
            return sizes_of(meta)
        except (ValueError, TokenizerError) as error:
            self.problem(Check.tokenizer, f"its tokenizer {meta.kind!r} cannot be used: {error}")
        return None

    def _places(self, walk: Walk, *, index: ShardIndex | None) -> Iterator[Place]:
        found: list[Place] = []
        for item in places_from_tar(walk):
            if isinstance(item, Member):
                text = f"member {item.name!r} at byte {item.offset} is no part of a document"
                self.problem(Check.layout, text)
            else:
                found.append(item)
        if index is None:
            yield from found
            return
        listed = list(places_from_index(index, walk=walk))
        if not walk.broken and _bytes_of(listed) != _bytes_of(found):
            text = (
                f"its index lists {len(listed)} documents, the tar holds {len(found)}, or they lie "
                "elsewhere; if the shard is as it should be, run `emu35 data index` on its folder"
            )
            self.problem(Check.sidecar, text)
        yield from listed

    def _document(
        self,
        data: Bytes,
        place: Place,
        *,
        meta: ShardMeta,
        index: ShardIndex | None,
        sizes: GridSizes,
    ) -> int:
        """Check one document; returns its largest id."""
        report = self.report
        report.documents += 1
        short = next(
            (m for m in (place.tokens, place.runs, place.json) if sum(m) > len(data)), None
        )
        if short is not None:
            text = f"it lies at bytes {short[0]}..{sum(short)} of a tar of {len(data)}"
            self.problem(Check.layout, text, place=place)
            return 0
        ids, runs = _words(data, place.tokens), _words(data, place.runs)
        record = parse_record(data[place.json[0] : sum(place.json)].tobytes())
        id = _id(record)
        if id is not None:
            report.named.append(place.row)
            report.names.append(hash(id))
        if len(ids) == 0 or place.tokens[1] % 4 or place.runs[1] % 4:
            text = f"it has {place.tokens[1]} bytes of tokens and {place.runs[1]} of modality runs"
            self.problem(Check.layout, text, place=place, id=id)
            return 0
        report.tokens += len(ids)
        indexed = None
        if index is not None:
            if not _same_bytes(data, place, checksum=int(index.checksum[place.row])):
                text = "its bytes changed after it was indexed"
                self.problem(Check.checksum, text, place=place, id=id)
            rows = slice(*index.span_row[place.row : place.row + 2].tolist())
            indexed = Indexed(spans=index.spans[rows], modality=index.modality[place.row])
        vocabulary = meta.vocabulary()
        for fault in check_document(
            ids=ids,
            runs=runs,
            record=record,
            indexed=indexed,
            vocabulary=vocabulary,
            sizes=sizes,
        ):
            self.problem(fault.check, fault.text, place=place, id=id)
        report.pictures += int(np.count_nonzero(ids == vocabulary.boi))
        return int(ids.max())


def _mapped(path: Path) -> Bytes:
    # As a plain array: memmaps pay for every slice.
    return np.memmap(path, np.uint8, "r").view(np.ndarray)


def _id(record: dict[str, Any] | None) -> str | None:
    id = record.get("id") if record else None
    return id if isinstance(id, str) else None


def _bytes_of(places: list[Place]) -> list[tuple[tuple[int, int], ...]]:
    return [(place.tokens, place.runs, place.json) for place in places]


def _words(data: Bytes, member: tuple[int, int]) -> Words:
    offset, size = member
    return data[offset : offset + size // 4 * 4].view("<u4")


def _same_bytes(data: Bytes, place: Place, *, checksum: int) -> bool:
    start, stop = checksum_range(
        token_word=place.tokens[0] // 4, run_word=place.runs[0] // 4, runs=place.runs[1] // 4
    )
    wide: npt.NDArray[np.uint64] = data[8 * start : 8 * stop].view("<u8")
    return checksum_of(wide) == checksum
