"""The members of a tar, header by header, as far as the headers can be read.

``tarfile`` ends a walk at a damaged header without a word; what is damaged is the point here.
"""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emu35.data.index_file import ShardIndex
from emu35.data.shards import BLOCK, DIGEST_MEMBER, META_MEMBER

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A member's name, and its bytes as [offset, offset + size) of the tar."""

    name: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the members of a document lie: offset and size in bytes of each. ``row`` is its number
    in the shard, ``key`` what its members are called where the headers could be read."""

    row: int
    key: str | None
    tokens: tuple[int, int]
    runs: tuple[int, int]
    json: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Walk:
    """The members of a tar, and why the walk ended before its end ("" where it did not)."""

    members: list[Member]
    broken: str

    def member(self, name: str) -> Member | None:
        return next((member for member in self.members if member.name == name), None)


def walk_tar(data: Bytes) -> Walk:
    """Read every header of a tar, from ``data``, all of its bytes."""
    members: list[Member] = []
    offset = 0
    while offset + BLOCK <= len(data):
        header = data[offset : offset + BLOCK]
        if not header.any():
            return Walk(members=members, broken=_after_end(data, offset=offset, members=members))
        try:
            info = tarfile.TarInfo.frombuf(header.tobytes(), "ascii", "strict")
        except (tarfile.HeaderError, ValueError):
            return Walk(members=members, broken=f"the tar header at byte {offset} is damaged")
        members.append(Member(name=info.name, offset=offset + BLOCK, size=info.size))
        offset = members[-1].end
    return Walk(members=members, broken=f"it ends in the middle of a member, at byte {len(data)}")


def _after_end(data: Bytes, *, offset: int, members: Sequence[Member]) -> str:
    last = members[-1].name if members else "nothing"
    if last != DIGEST_MEMBER:
        return f"zeros at byte {offset} end it after {last}, before its closing digest"
    rest = len(data) - offset
    if rest != 2 * BLOCK or data[offset:].any():
        return f"{rest} bytes follow its closing digest, where {2 * BLOCK} zeros should"
    return ""


def places_from_tar(walk: Walk) -> Iterator[Place | Member]:
    """The documents of a walk; members that belong to none come as they are."""
    members = [m for m in walk.members if m.name not in (META_MEMBER, DIGEST_MEMBER)]
    row = at = 0
    while at < len(members):
        three = members[at : at + 3]
        key = three[0].name.removesuffix(".tok")
        if [m.name for m in three] != [f"{key}.tok", f"{key}.mod", f"{key}.json"]:
            yield three[0]
            at += 1
            continue
        tokens, runs, json = ((m.offset, m.size) for m in three)
        yield Place(row=row, key=key, tokens=tokens, runs=runs, json=json)
        row += 1
        at += 3


def places_from_index(index: ShardIndex, *, walk: Walk) -> Iterator[Place]:
    """The documents of an index, named as far as the headers of the tar could be read."""
    names = {member.offset: member.name.removesuffix(".tok") for member in walk.members}
    columns = (
        index.token_word,
        index.length,
        index.run_word,
        index.runs,
        index.json_byte,
        index.json_size,
    )
    for row, (word, length, run, runs, json, size) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        yield Place(
            row=row,
            key=names.get(4 * word),
            tokens=(4 * word, 4 * length),
            runs=(4 * run, 4 * runs),
            json=(json, size),
        )
