"""The ``.idx`` sidecar of a shard as bytes, and the arrays it holds.

Layout: magic, format version and header length (two uint32), a JSON header, the arrays one
after the other at multiples of 8 bytes, and the sha256 of all that. It is read whole; a changed
byte anywhere in it is noticed. The index of a packed shard has a format version of its own and two
more arrays, so that an emu35 that takes every member for one document refuses it. Versions 1 and 2
had another checksum; indices of them are made anew, which changes nothing in the shards.
"""

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from emu35.data.pieces import check_pieces
from emu35.data.place import Place
from emu35.data.shards import BLOCK, TAIL, ShardMeta
from emu35.errors import DataError
from emu35.tokens.serialize import Modality

_MAGIC = b"EMU35IDX"
_VERSION = 3
_PACKED_VERSION = 4
_PREFIX = struct.Struct("<8sII")
_DIGEST_BYTES = 32
ARRAYS = {
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
PACKED_ARRAYS = {**ARRAYS, "piece_row": "<i8", "pieces": "<i8"}

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
        checksum: [N] xxh3 of the bytes from the first token block to the last run block.
        span_row: [N + 1] rows of ``spans`` that belong to each document.
        spans: [M, 2] first and past-the-last token of each picture.
        piece_row: [N + 1] rows of ``pieces`` that belong to each row; empty if not packed.
        pieces: [P, 3] where a piece begins in its row, where in its document, and how long that
            document is.
    """

    path: Place
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


def packed_length(shards: Sequence[ShardIndex]) -> int | None:
    """The length of the rows that all ``shards`` hold, None if they hold documents.

    Raises:
        DataError: if some hold rows and others documents, or longer rows.
    """
    packed = shards[0].meta.packed
    for shard in shards:
        if shard.meta.packed != packed:
            what = [
                "documents" if length is None else f"rows packed to {length} tokens"
                for length in (packed, shard.meta.packed)
            ]
            raise DataError(
                f"shard {shards[0].path} holds {what[0]} and {shard.path} holds {what[1]}; keep "
                "them in folders of their own, each a source"
            )
    return packed


def _arrays(meta: ShardMeta) -> dict[str, str]:
    """The arrays of an index by name, and their types."""
    return ARRAYS if meta.packed is None else PACKED_ARRAYS


def encode_index(index: ShardIndex) -> bytes:
    """The content of the sidecar."""
    kinds = _arrays(index.meta)
    version = _VERSION if index.meta.packed is None else _PACKED_VERSION
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
    # The JSON is padded with spaces so that every array is aligned.
    header += b" " * (-len(header) % 8)
    body = b"".join(
        [
            _PREFIX.pack(_MAGIC, version, len(header)),
            header,
            *(array.tobytes() for array in arrays.values()),
        ]
    )
    return body + hashlib.sha256(body).digest()


def decode_index(data: bytes, *, shard: Place, sidecar: Place, remedy: str) -> ShardIndex:
    """The index of ``shard`` from the bytes of ``sidecar``.

    Raises:
        DataError: with ``remedy``, if a byte is not what was written, or what was written makes no
            sense, however absurd.
    """
    body, seal = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if len(data) < _PREFIX.size + _DIGEST_BYTES or hashlib.sha256(body).digest() != seal:
        raise DataError(f"index {sidecar} is damaged; {remedy}")
    magic, version, header_size = _PREFIX.unpack_from(body)
    if magic != _MAGIC or version not in (_VERSION, _PACKED_VERSION):
        raise DataError(f"index {sidecar} has another format (version {version}); {remedy}")
    try:
        index = _decode(body, header_size=header_size, shard=shard)
        check_sense(index)
    # The seal is right, so somebody made these bytes on purpose; they still stop nothing.
    except (LookupError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"index {sidecar} makes no sense ({error}); {remedy}") from error
    return index


def _decode(body: bytes, *, header_size: int, shard: Place) -> ShardIndex:
    header: dict[str, Any] = json.loads(body[_PREFIX.size : _PREFIX.size + header_size])
    meta = ShardMeta.checked(header["meta"])
    arrays: dict[str, Any] = {}
    offset = _PREFIX.size + header_size
    for name, kind in _arrays(meta).items():
        shape = [_natural(size, name=name) for size in header["shapes"][name]]
        # A product of numpy's would wrap around.
        count = math.prod(shape)
        if offset + 8 * count > len(body):
            raise ValueError(f"{name} of shape {shape} goes past the end of the file")
        arrays[name] = np.frombuffer(body, kind, count=count, offset=offset).reshape(shape)
        offset += 8 * count
    digest = header["digest"]
    if not isinstance(digest, str):
        raise TypeError("the digest is no text")
    return ShardIndex(
        path=shard,
        meta=meta,
        digest=digest,
        tar_bytes=_natural(header["tar_bytes"], name="tar_bytes"),
        max_token=_natural(header["max_token"], name="max_token"),
        **arrays,
    )


def _natural(value: object, *, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise ValueError(f"{name} {str(value)[:40]!r} is no size")
    return value


def check_sense(index: ShardIndex) -> None:
    """Check that everything lies inside the tar, and that no array contradicts another.

    Raises:
        ValueError: saying what does not fit.
    """
    documents, pictures = len(index.length), len(index.spans)
    shapes = dict.fromkeys(ARRAYS, (documents,)) | {
        "modality": (documents, len(Modality)),
        "span_row": (documents + 1,),
        "spans": (pictures, 2),
    }
    for name, shape in shapes.items():
        if getattr(index, name).shape != shape:
            raise ValueError(f"{name} has shape {getattr(index, name).shape}, not {shape}")
    if index.tar_bytes % BLOCK or index.tar_bytes < TAIL:
        raise ValueError(f"no tar has {index.tar_bytes} bytes")
    words = index.tar_bytes // 4
    sizes_right = (
        _within(index.token_word, index.length, end=words)
        and _within(index.run_word, index.runs, end=words)
        and _within(index.json_byte, index.json_size, end=index.tar_bytes)
        and bool(np.all(index.token_word + index.length <= index.run_word))
        and bool(np.all(index.length > 0) and np.all(index.modality >= 0))
        # Each is at most the length, so that the sum cannot wrap around.
        and bool(np.all(index.modality <= index.length[:, None]))
        and bool(np.all(index.modality.sum(axis=1) == index.length))
    )
    if not sizes_right:
        raise ValueError("a document lies outside the tar or has no tokens")
    rows = index.span_row
    if rows[0] != 0 or rows[-1] != pictures or bool(np.any(np.diff(rows) < 0)):
        raise ValueError("pictures belong to no document")
    limit = np.repeat(index.length, np.diff(rows))
    start, end = index.spans[:, 0], index.spans[:, 1]
    if bool(np.any(start < 0) or np.any(start >= end) or np.any(end > limit)):
        raise ValueError("a picture lies outside its document")
    if index.meta.packed is not None:
        check_pieces(piece_row=index.piece_row, pieces=index.pieces, length=index.length)
        if bool(np.any(index.length > index.meta.packed)):
            raise ValueError(f"a row is longer than {index.meta.packed} tokens")


def _within(first: Ints, count: Ints, *, end: int) -> bool:
    """Whether every [first, first + count) lies in [0, end)."""
    # In this order no sum can wrap around.
    return bool(np.all(first >= 0) and np.all(count >= 0) and np.all(count <= end)) and bool(
        np.all(first <= end - count)
    )
