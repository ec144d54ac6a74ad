"""The index of a shard: made from its bytes, read from its sidecar, tied to its tar.

Three checks tie an index to its tar, each as cheap as its moment allows:

- at open: the tar has the size the index says and ends in the digest the index names. That finds a
  tar that was replaced, truncated, or written again, whatever its modification time;
- at every read of a document: xxh3 of its tokens and runs, which finds an edit in place (but not
  one that is made to match: it is no cryptographic hash);
- ``emu35 data index --verify``: sha256 of the whole tar.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from emu35.data.cache import Unreachable
from emu35.data.index_file import (
    PACKED_ARRAYS,
    Ints,
    ShardIndex,
    check_sense,
    decode_index,
    encode_index,
)
from emu35.data.pieces import piece_table
from emu35.data.place import Place, Url
from emu35.data.shards import (
    BLOCK,
    DIGEST_MEMBER,
    META_MEMBER,
    TAIL,
    ShardFile,
    ShardMeta,
    atomic_file,
    count_modalities,
    read_tail,
    tail_digest,
)
from emu35.data.storage import LocalFolder, ShardFolder
from emu35.errors import DataError
from emu35.tokens.serialize import Modality

_HEADER_ROOM = 2**20
"""An index is smaller than its tar, but for its header."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedShard:
    """A shard that cannot be used, and why, with what to do about it."""

    name: str
    reason: str


def index_path(shard: Path) -> Path:
    """The sidecar of ``shard``."""
    return shard.with_name(_sidecar(shard.name))


def _sidecar(name: str) -> str:
    return f"{name.removesuffix('.tar')}.idx"


def checksum_range(*, token_word: int, run_word: int, runs: int) -> tuple[int, int]:
    """The uint64 words of a mapped tar that a document's checksum covers, as [start, stop).

    Tokens, the header between and the runs are neighbours in the tar, so one call does.
    """
    stop_byte = -(-4 * (run_word + runs) // BLOCK) * BLOCK
    return token_word // 2, stop_byte // 8


def checksum_of(wide: npt.NDArray[np.uint64]) -> int:
    """Of the words of :func:`checksum_range`: their order counts, unlike in an exclusive-or, which
    misses exchanged blocks, zeros in the place of equal words, and one in 64 pairs of flipped bits.
    It is faster than that, too."""
    return xxhash.xxh3_64_intdigest(wide.data)


def build_index(shard: Path) -> ShardIndex:
    """Read a shard from its bytes alone, check it against its own digest and write its index.

    Raises:
        DataError: if the file is not a complete, unaltered shard.
    """
    try:
        with shard.open("rb") as file:
            index = _scan(shard, file=file)
    except FileNotFoundError as error:
        raise DataError(
            f"index {index_path(shard)} has no shard {shard.name} beside it; restore the shard"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {shard}: {error.strerror or error}; restore it") from error
    with atomic_file(index_path(shard)) as file:
        file.write(encode_index(index))
    return index


def _scan(shard: Place, *, file: BinaryIO) -> ShardIndex:
    """The index of an open shard. Raises: DataError if it is not a complete, unaltered shard."""
    digest = tail_digest(read_tail(file))
    if digest is None or digest != _sha256(file, stop=-TAIL):
        raise DataError(
            f"{shard} is not a complete, unaltered token shard (its closing digest does not match "
            "its bytes); write it again with `emu35 data ingest`"
        )
    try:
        return _scan_members(shard, file=file, digest=digest)
    # The digest is right, so somebody made these bytes on purpose; they still stop nothing.
    except (
        tarfile.TarError,
        LookupError,
        ValueError,
        TypeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise DataError(
            f"{shard} is no token shard of this version of emu35 ({error}); "
            "write it again with `emu35 data ingest`"
        ) from error


def _scan_members(shard: Place, *, file: BinaryIO, digest: str) -> ShardIndex:
    mapped = ShardFile(shard, file=file)
    size = mapped.words.nbytes
    members: dict[str, tuple[int, int]] = {}
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.size < 0 or member.offset_data + member.size > size:
                raise ValueError(f"member {member.name} goes past the end")
            members[member.name] = (member.offset_data, member.size)
    meta_offset, meta_size = members.pop(META_MEMBER)
    del members[DIGEST_MEMBER]
    meta = ShardMeta.from_json(mapped.text(offset=meta_offset, size=meta_size))
    rows: list[tuple[int, ...]] = []
    modality: list[Ints] = []
    checksum: list[int] = []
    spans: list[list[int]] = []
    span_row = [0]
    pieces: list[list[int]] = []
    piece_row = [0] if meta.packed is not None else []
    max_token = 0
    for key in (name[: -len(".tok")] for name in members if name.endswith(".tok")):
        token_byte, token_size = members[f"{key}.tok"]
        run_byte, run_size = members[f"{key}.mod"]
        json_byte, json_size = members[f"{key}.json"]
        facts: dict[str, Any] = json.loads(mapped.text(offset=json_byte, size=json_size))
        word, length, run_word, runs = (
            n // 4 for n in (token_byte, token_size, run_byte, run_size)
        )
        rows.append((word, length, run_word, runs, json_byte, json_size))
        modality.append(count_modalities(mapped.words[run_word : run_word + runs]))
        start, stop = checksum_range(token_word=word, run_word=run_word, runs=runs)
        checksum.append(checksum_of(mapped.wide[start:stop]))
        max_token = max(max_token, int(mapped.words[word : word + length].max()))
        spans.extend([image[0], image[1]] for image in facts["images"])
        span_row.append(len(spans))
        if meta.packed is not None:
            pieces.extend(piece_table(facts))
            piece_row.append(len(pieces))
    table = np.array(rows, dtype=np.int64).reshape(-1, 6)
    index = ShardIndex(
        path=shard,
        meta=meta,
        digest=digest,
        tar_bytes=size,
        max_token=max_token,
        token_word=table[:, 0].copy(),
        length=table[:, 1].copy(),
        run_word=table[:, 2].copy(),
        runs=table[:, 3].copy(),
        json_byte=table[:, 4].copy(),
        json_size=table[:, 5].copy(),
        modality=np.array(modality, dtype=np.int64).reshape(-1, len(Modality)),
        checksum=np.array(checksum, dtype=np.uint64),
        span_row=np.array(span_row, dtype=np.int64),
        spans=np.array(spans, dtype=np.int64).reshape(-1, 2),
        piece_row=np.array(piece_row, dtype=np.int64),
        pieces=np.array(pieces, dtype=np.int64).reshape(-1, 3),
    )
    check_sense(index)
    return index


def _sha256(file: BinaryIO, *, stop: int = 0) -> str:
    """sha256 of a file's bytes up to ``stop`` (zero or negative: counted from the end)."""
    sha = hashlib.sha256()
    left = file.seek(0, 2) + stop
    file.seek(0)
    while left > 0 and (chunk := file.read(min(left, 2**20))):
        sha.update(chunk)
        left -= len(chunk)
    return sha.hexdigest()


def read_index(shard: Path) -> ShardIndex:
    """Read the index of ``shard`` and check cheaply that it belongs to the tar beside it.

    Raises:
        DataError: if either file is missing or damaged, or they do not match.
    """
    return read_index_in(LocalFolder(shard.parent), name=shard.name)


def read_index_in(folder: ShardFolder, *, name: str) -> ShardIndex:
    """:func:`read_index` of the shard ``name`` in ``folder``.

    Raises:
        Unreachable: it cannot be read for now.
        DataError: if either file is missing or damaged, or they do not match.
    """
    shard, beside = folder.place / name, _sidecar(name)
    sidecar = folder.place / beside
    size = folder.size(name)
    if size is None:
        raise DataError(f"index {sidecar} has no shard {name} beside it; restore the shard")
    index_size = folder.size(beside)
    if index_size is None:
        raise DataError(f"shard {shard} has no index; {folder.rebuild}")
    if index_size > size + _HEADER_ROOM:
        raise DataError(
            f"index {sidecar} has {index_size} bytes, more than a shard of {size} can have; "
            f"{folder.rebuild}"
        )
    index = decode_index(
        folder.content(beside), shard=shard, sidecar=sidecar, remedy=folder.rebuild
    )
    if size != index.tar_bytes:
        raise DataError(
            f"shard {shard} has {size} bytes but its index was made for {index.tar_bytes}; "
            f"the shard was replaced or cut short. Restore it, or {folder.rebuild}"
        )
    if tail_digest(folder.tail(name, size=size)) != index.digest:
        raise DataError(
            f"shard {shard} is not the one its index was made for (the digests differ). "
            f"Restore it, or {folder.rebuild}"
        )
    return index


def read_indices(folder: ShardFolder) -> tuple[list[ShardIndex], list[DamagedShard]]:
    """The indices of all shards of a folder in name order, and the shards that cannot be used.

    Raises:
        Unreachable: something cannot be read for now.
        DataError: if the folder does not exist or holds no shard.
    """

    def look(name: str) -> ShardIndex | DamagedShard:
        try:
            return read_index_in(folder, name=name)
        except Unreachable:
            raise
        except DataError as error:
            return DamagedShard(name=name, reason=str(error))

    found = list(_each(look, shard_names(folder), readers=folder.readers))
    return (
        [entry for entry in found if isinstance(entry, ShardIndex)],
        [entry for entry in found if isinstance(entry, DamagedShard)],
    )


def _each(
    look: Callable[[str], ShardIndex | DamagedShard], names: Sequence[str], *, readers: int
) -> Iterator[ShardIndex | DamagedShard]:
    if readers == 1:
        yield from map(look, names)
        return
    with ThreadPoolExecutor(readers, thread_name_prefix="emu35-index") as pool:
        try:
            yield from pool.map(look, names)
        finally:
            # What failed is told now, not after all that are waiting have failed as well.
            pool.shutdown(cancel_futures=True)


def verify_index(shard: Path) -> ShardIndex:
    """Like :func:`read_index`, but hash the whole tar and compare every entry.

    Raises:
        DataError: on the first difference.
    """
    return verify_index_in(LocalFolder(shard.parent), name=shard.name)


def verify_index_in(folder: ShardFolder, *, name: str) -> ShardIndex:
    """:func:`verify_index` of the shard ``name`` in ``folder``.

    Raises:
        DataError: on the first difference.
    """
    index = read_index_in(folder, name=name)
    with folder.open(name, size=index.tar_bytes, digest=index.digest) as file:
        fresh = _scan(index.path, file=file)
    same = all(np.array_equal(getattr(index, name), getattr(fresh, name)) for name in PACKED_ARRAYS)
    if not same or index.meta != fresh.meta or index.max_token != fresh.max_token:
        raise DataError(
            f"the index of {index.path} differs from what the shard holds; {folder.rebuild}"
        )
    return index


def find_shards(folder: Path) -> list[Path]:
    """The shards of a local source folder in name order.

    Raises:
        DataError: if the folder does not exist or holds no shard.
    """
    return [folder / name for name in shard_names(LocalFolder(folder))]


def shard_names(folder: ShardFolder) -> list[str]:
    """The names of the shards (``.tar``) of a source folder, sorted.

    Raises:
        DataError: if the folder does not exist or holds no shard.
    """
    # An index whose tar is gone counts, so that a lost shard is reported rather than skipped.
    stems = {
        name.rsplit(".", 1)[0]
        for name in folder.names()
        if name.endswith((".tar", ".idx")) and not name.startswith(".")
    }
    if stems:
        return [f"{stem}.tar" for stem in sorted(stems)]
    place = folder.place
    below: list[str] = []
    if isinstance(place, Path):
        below = sorted({path.parent.name for path in place.glob("*/*.tar")})
    hint = f"did you mean its folder {' or '.join(below)}?" if below else "write some with "
    hint += "" if below else "`emu35 data ingest`"
    if isinstance(place, Url):
        hint += "; a server has to list the names of its files"
    raise DataError(f"shard folder {place} holds no .tar shard; {hint}")
