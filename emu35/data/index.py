"""The ``.idx`` sidecar of a shard, and the index of a whole source folder.

File layout: magic, format version and header length (two uint32), a JSON header, the arrays one
after the other at multiples of 8 bytes, and the sha256 of all that. It is read whole; a changed
byte anywhere in it is noticed. The index of a packed shard has format version 2 and two more
arrays, so that an emu35 that takes every member for one document refuses it.

Three checks tie an index to its tar, each as cheap as its moment allows:

- at open: the tar has the size the index says and ends in the digest the index names. That finds a
  tar that was replaced, truncated, or written again, whatever its modification time;
- at every read of a document: the exclusive-or of its bytes, which finds an edit in place;
- ``emu35 data index --verify``: sha256 of the whole tar.
"""

import hashlib
import json
import struct
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emu35.data.pieces import check_pieces, piece_table
from emu35.data.shards import (
    BLOCK,
    DIGEST_MEMBER,
    META_MEMBER,
    TAIL,
    ShardFile,
    ShardMeta,
    atomic_file,
    count_modalities,
    read_tail_digest,
)
from emu35.errors import DataError
from emu35.tokens.serialize import Modality

_MAGIC = b"EMU35IDX"
_VERSION = 1
_PACKED_VERSION = 2
_PREFIX = struct.Struct("<8sII")
_DIGEST_BYTES = 32
_ARRAYS = {
    "token_word": "<i8",
    "length": "<i8",
    "run_word": "<i8",
    "runs": "<i8",
    "json_byte": "<i8",
    "json_size": "<i8",
    "modality": "<i8",
    "checksum": "<u8",
    "span_row": "<i8",
    "spans": "<i8",
}
_PACKED_ARRAYS = {**_ARRAYS, "piece_row": "<i8", "pieces": "<i8"}

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """Where everything in one shard lies. N documents (rows in a packed shard), M pictures, P
    pieces of rows.

    Attributes:
        token_word, length: [N] first token as a uint32 offset into the tar, and token count.
        run_word, runs: [N] first modality run as a uint32 offset, and run count.
        json_byte, json_size: [N] the JSON member.
        modality: [N, 4] tokens of each :class:`Modality`.
        checksum: [N] exclusive-or of the bytes from the first token block to the last run block.
        span_row: [N + 1] rows of ``spans`` that belong to each document.
        spans: [M, 2] first and past-the-last token of each picture.
        piece_row: [N + 1] rows of ``pieces`` that belong to each row; empty if not packed.
        pieces: [P, 3] where a piece begins in its row, where in its document, and how long that
            document is.
    """

    path: Path
    meta: ShardMeta
    digest: str
    tar_bytes: int
    max_token: int
    token_word: Ints
    length: Ints
    run_word: Ints
    runs: Ints
    json_byte: Ints
    json_size: Ints
    modality: Ints
    checksum: npt.NDArray[np.uint64]
    span_row: Ints
    spans: Ints
    piece_row: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    pieces: Ints = field(default_factory=lambda: np.zeros((0, 3), np.int64))

    def __len__(self) -> int:
        return len(self.length)


def index_path(shard: Path) -> Path:
    """The sidecar of ``shard``."""
    return shard.with_suffix(".idx")


def checksum_range(*, token_word: int, run_word: int, runs: int) -> tuple[int, int]:
    """The uint64 words of a mapped tar that a document's checksum covers, as [start, stop).

    Tokens, the header between and the runs are neighbours in the tar, so one reduction does.
    """
    stop_byte = -(-4 * (run_word + runs) // BLOCK) * BLOCK
    return token_word // 2, stop_byte // 8


def build_index(shard: Path) -> ShardIndex:
    """Read a shard from its bytes alone, check it against its own digest and write its index.

    Raises:
        DataError: if the file is not a complete, unaltered shard.
    """
    index = _scan(shard)
    _write(index)
    return index


def _scan(shard: Path) -> ShardIndex:
    digest = read_tail_digest(shard)
    if digest is None or digest != _sha256(shard, stop=-TAIL):
        raise DataError(
            f"{shard} is not a complete, unaltered token shard (its closing digest does not match "
            "its bytes); write it again with `emu35 data ingest`"
        )
    file = ShardFile(shard)
    members: dict[str, tuple[int, int]] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            members[member.name] = (member.offset_data, member.size)
    try:
        meta_offset, meta_size = members.pop(META_MEMBER)
        del members[DIGEST_MEMBER]
        meta = ShardMeta.from_json(file.text(offset=meta_offset, size=meta_size))
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{shard} is no token shard of this version of emu35 ({error}); "
            "write it again with `emu35 data ingest`"
        ) from error
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
        facts: dict[str, Any] = json.loads(file.text(offset=json_byte, size=json_size))
        word, length, run_word, runs = (
            n // 4 for n in (token_byte, token_size, run_byte, run_size)
        )
        rows.append((word, length, run_word, runs, json_byte, json_size))
        modality.append(count_modalities(file.words[run_word : run_word + runs]))
        start, stop = checksum_range(token_word=word, run_word=run_word, runs=runs)
        checksum.append(int(np.bitwise_xor.reduce(file.wide[start:stop])))
        max_token = max(max_token, int(file.words[word : word + length].max()))
        spans.extend([image[0], image[1]] for image in facts["images"])
        span_row.append(len(spans))
        if meta.packed is not None:
            pieces.extend(_piece_table(facts, shard=shard))
            piece_row.append(len(pieces))
    table = np.array(rows, dtype=np.int64).reshape(-1, 6)
    return ShardIndex(
        path=shard,
        meta=meta,
        digest=digest,
        tar_bytes=shard.stat().st_size,
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


def _piece_table(facts: dict[str, Any], *, shard: Path) -> list[list[int]]:
    try:
        return piece_table(facts)
    except (LookupError, ValueError, TypeError) as error:
        raise DataError(
            f"{shard} is no packed shard of this version of emu35 ({error}); "
            "write it again with `emu35 data pack`"
        ) from error


def _arrays(meta: ShardMeta) -> dict[str, str]:
    """The arrays of an index by name, and their types."""
    return _ARRAYS if meta.packed is None else _PACKED_ARRAYS


def _sha256(path: Path, *, stop: int = 0) -> str:
    """sha256 of a file's bytes up to ``stop`` (zero or negative: counted from the end)."""
    sha = hashlib.sha256()
    left = path.stat().st_size + stop
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, 2**20))):
            sha.update(chunk)
            left -= len(chunk)
    return sha.hexdigest()


def _write(index: ShardIndex) -> None:
    kinds = _arrays(index.meta)
    arrays = {name: getattr(index, name).astype(kind) for name, kind in kinds.items()}
    header = json.dumps(
        {
            "meta": index.meta.fields(),
            "digest": index.digest,
            "tar_bytes": index.tar_bytes,
            "max_token": index.max_token,
            "shapes": {name: list(array.shape) for name, array in arrays.items()},
        }
    ).encode()
    version = _VERSION if index.meta.packed is None else _PACKED_VERSION
    # The JSON is padded with spaces so that every array is aligned.
    header += b" " * (-len(header) % 8)
    body = b"".join(
        [
            _PREFIX.pack(_MAGIC, version, len(header)),
            header,
            *(array.tobytes() for array in arrays.values()),
        ]
    )
    with atomic_file(index_path(index.path)) as file:
        file.write(body + hashlib.sha256(body).digest())


def read_index(shard: Path) -> ShardIndex:
    """Read the index of ``shard`` and check cheaply that it belongs to the tar beside it.

    Raises:
        DataError: if either file is missing or damaged, or they do not match.
    """
    sidecar = index_path(shard)
    remedy = f"run `emu35 data index {shard.parent}` to rebuild it"
    if not shard.is_file():
        raise DataError(f"index {sidecar} has no shard {shard.name} beside it; restore the shard")
    if not sidecar.is_file():
        raise DataError(f"shard {shard} has no index; {remedy}")
    try:
        return _check_match(_parse(sidecar.read_bytes(), shard=shard, remedy=remedy), remedy=remedy)
    except OSError as error:
        raise DataError(f"cannot read {shard} and its index: {error.strerror}") from error


def _parse(data: bytes, *, shard: Path, remedy: str) -> ShardIndex:
    """An index from the bytes of its file."""
    sidecar = index_path(shard)
    body, seal = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if len(data) < _PREFIX.size + _DIGEST_BYTES or hashlib.sha256(body).digest() != seal:
        raise DataError(f"index {sidecar} is damaged; {remedy}")
    magic, version, header_size = _PREFIX.unpack_from(body)
    if magic != _MAGIC or version not in (_VERSION, _PACKED_VERSION):
        raise DataError(f"index {sidecar} has another format (version {version}); {remedy}")
    header: dict[str, Any] = json.loads(body[_PREFIX.size : _PREFIX.size + header_size])
    meta = ShardMeta(**header["meta"])
    arrays: dict[str, Any] = {}
    offset = _PREFIX.size + header_size
    for name, kind in _arrays(meta).items():
        shape: list[int] = header["shapes"][name]
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(body, kind, count=count, offset=offset).reshape(shape)
        offset += 8 * count
    if meta.packed is not None:
        try:
            check_pieces(
                piece_row=arrays["piece_row"], pieces=arrays["pieces"], length=arrays["length"]
            )
        except ValueError as error:
            raise DataError(f"index {sidecar} makes no sense ({error}); {remedy}") from error
    return ShardIndex(
        path=shard,
        meta=meta,
        digest=header["digest"],
        tar_bytes=header["tar_bytes"],
        max_token=header["max_token"],
        **arrays,
    )


def _check_match(index: ShardIndex, *, remedy: str) -> ShardIndex:
    """Whether the tar beside an index is the one it was made for, by size and closing digest."""
    shard = index.path
    size = shard.stat().st_size
    if size != index.tar_bytes:
        raise DataError(
            f"shard {shard} has {size} bytes but its index was made for {index.tar_bytes}; "
            f"the shard was replaced or cut short. Restore it, or {remedy}"
        )
    if read_tail_digest(shard) != index.digest:
        raise DataError(
            f"shard {shard} is not the one its index was made for (the digests differ). "
            f"Restore it, or {remedy}"
        )
    return index


def verify_index(shard: Path) -> ShardIndex:
    """Like :func:`read_index`, but hash the whole tar and compare every entry.

    Raises:
        DataError: on the first difference.
    """
    index = read_index(shard)
    fresh = _scan(shard)
    names = _PACKED_ARRAYS
    same = all(np.array_equal(getattr(index, name), getattr(fresh, name)) for name in names)
    if not same or index.meta != fresh.meta or index.max_token != fresh.max_token:
        raise DataError(
            f"the index of {shard} differs from what the shard holds; "
            f"run `emu35 data index {shard.parent}` to rebuild it"
        )
    return index


def find_shards(folder: Path) -> list[Path]:
    """The shards of a source folder in name order.

    Raises:
        DataError: if the folder does not exist or holds no shard.
    """
    if not folder.is_dir():
        raise DataError(f"shard folder {folder} does not exist; write it with `emu35 data ingest`")
    # An index whose tar is gone counts, so that a lost shard is reported rather than skipped.
    names = {path.stem for path in folder.iterdir() if path.suffix in (".tar", ".idx")}
    shards = [folder / f"{name}.tar" for name in sorted(names) if not name.startswith(".")]
    if not shards:
        below = sorted({path.parent.name for path in folder.glob("*/*.tar")})
        hint = f"did you mean its folder {' or '.join(below)}?" if below else "write some with "
        hint += "" if below else "`emu35 data ingest`"
        raise DataError(f"shard folder {folder} holds no .tar shard; {hint}")
    return shards
