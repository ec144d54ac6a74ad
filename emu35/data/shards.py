"""The token shard: a plain webdataset tar, and its memory-mapped reader.

Layout of ``<source>-000000.tar`` (USTAR, every member padded to 512 bytes)::

    __emu35__/shard.json    ShardMeta; stock webdataset skips names of this form
    000000-000000.tok       token ids, uint32 little endian
    000000-000000.mod       modality runs, uint32 little endian: length << 4 | code
    000000-000000.json      {"id", "source", "tokens", "images": [[start, end, rows, columns], ...]}
    ...
    __emu35__/digest        sha256 (hex) of every byte before this member

In a packed shard (``emu35 data pack``) these members are one row each: the tokens and runs of its
pieces end to end, without padding, and the JSON has ``"pieces"`` besides
(:mod:`emu35.data.pieces`).

Because members start at multiples of 512, a mapped tar viewed as uint32 words gives each
document's tokens as one aligned slice. The digest sits at a fixed distance from the end, so that
an index can tell with one read whether it belongs to the tar beside it.
"""

import contextlib
import errno
import json
import mmap
import os
import tarfile
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from emu35 import files
from emu35.data.place import Place
from emu35.errors import DataError
from emu35.tokens.serialize import Modality, TokenSequence
from emu35.tokens.vocabulary import Vocabulary

FORMAT = 1
META_MEMBER = "__emu35__/shard.json"
DIGEST_MEMBER = "__emu35__/digest"
BLOCK = tarfile.BLOCKSIZE
NAME_BYTES = 100
"""The header of a tar member begins with its name, padded with zeros."""
# Digest member (header and one block) plus the two zero blocks that end a tar.
TAIL = 4 * BLOCK

RUN_CODE_BITS = 4
"""Of a word of modality runs; the others are how long the run is."""

Words = npt.NDArray[np.uint32]
Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardMeta:
    """What all documents of a shard share: their source and the tokenizer that made the ids.

    ``vision`` is the digest of the image tokenizer's weights, None where no picture was encoded.
    ``vision_dtype`` is what the codes were computed in, None also in shards of earlier versions.
    ``packed`` is the length of the rows that they were packed into, None where each member is one
    document.
    """

    source: str
    kind: str
    n_text: int
    codebook_size: int
    vision: str | None = None
    vision_dtype: str | None = None
    packed: int | None = None

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(n_text=self.n_text, codebook_size=self.codebook_size)

    def fields(self) -> dict[str, Any]:
        """For JSON; those of a shard that is not packed are what they were before there were
        packed ones, and so are its bytes."""
        fields = asdict(self)
        if self.packed is None:
            del fields["packed"]
        return fields

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **self.fields()}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "ShardMeta":
        """Raises: ValueError, KeyError or TypeError if the text is not a shard's metadata."""
        fields: dict[str, Any] = json.loads(text)
        if fields.pop("format") != FORMAT:
            raise ValueError("another format version")
        return ShardMeta.checked(fields)

    @staticmethod
    def checked(fields: dict[str, Any]) -> "ShardMeta":
        """Raises: TypeError or ValueError if a field is missing, unknown or of another type."""
        meta = ShardMeta(**fields)
        names: list[object] = [meta.source, meta.kind, meta.vision or ""]
        sizes: list[object] = [meta.n_text, meta.codebook_size]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a name in the metadata is no text")
        if not all(isinstance(size, int) and 0 < size < 2**32 for size in sizes):
            raise ValueError(f"no vocabulary has {sizes[0]} text ids and {sizes[1]} codes")
        rows: list[object] = [] if meta.packed is None else [meta.packed]
        if not all(isinstance(row, int) and 0 < row < 2**32 for row in rows):
            raise ValueError(f"no row has {str(meta.packed)[:40]} tokens")
        return meta


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpan:
    """A picture inside a token sequence: [start, end) from BOI to EOI, and its grid of codes."""

    start: int
    end: int
    rows: int
    columns: int


def encode_runs(modality: Codes) -> Words:
    """Run-length code of a modality array, one word a run."""
    if modality.size == 0:
        return np.zeros(0, np.uint32)
    starts = np.flatnonzero(np.diff(modality, prepend=modality[0] ^ 0xFF))
    lengths = np.diff(starts, append=modality.size).astype(np.uint32)
    return (lengths << np.uint32(RUN_CODE_BITS)) | modality[starts].astype(np.uint32)


def decode_runs(words: Words) -> Codes:
    """Inverse of :func:`encode_runs`; concatenated runs decode to the concatenation."""
    codes = (words & ((1 << RUN_CODE_BITS) - 1)).astype(np.uint8)
    return np.repeat(codes, words >> RUN_CODE_BITS)


def image_spans(sequence: TokenSequence, *, vocabulary: Vocabulary) -> list[ImageSpan]:
    """Find the pictures of a serialized document.

    Raises:
        DataError: if BOI and EOI do not pair up or a picture is ragged.
    """
    tokens = sequence.tokens
    starts = np.flatnonzero(tokens == vocabulary.boi)
    ends = np.flatnonzero(tokens == vocabulary.eoi) + 1
    if len(starts) != len(ends) or bool(np.any(starts >= ends)):
        raise DataError(f"{len(starts)} pictures are opened but {len(ends)} are closed")
    spans: list[ImageSpan] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        part = tokens[start:end]
        rows = int(np.count_nonzero(part == vocabulary.eol)) + 1
        codes = int(np.count_nonzero(part >= vocabulary.visual_start))
        if codes == 0 or codes % rows:
            raise DataError(f"a picture of {codes} codes in {rows} rows is ragged")
        spans.append(ImageSpan(start=start, end=end, rows=rows, columns=codes // rows))
    return spans


@contextlib.contextmanager
def atomic_file(path: Path) -> Generator[BinaryIO, None, None]:
    """Open a temporary file that becomes ``path`` on success and vanishes on failure.

    Raises:
        DataError: when the disk is full; ``path`` is left as it was.
    """
    try:
        with files.atomic_file(path) as file:
            yield file
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"no space left to write {path}; nothing half written was kept. "
                "Free some space and run the same command again"
            ) from error
        raise


def member_header(name: str, size: int) -> bytes:
    """USTAR header of a regular file; the same name and size give the same bytes."""
    # Time, owner and mode are fixed, so that the same documents give the same bytes.
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


class ShardFile:
    """A mapped shard; ``words`` is the whole tar as uint32, ``wide`` as uint64, ``inode`` tells
    the file from another of its name."""

    __slots__ = ("_map", "inode", "path", "wide", "words")

    def __init__(self, path: Place, *, file: BinaryIO) -> None:
        """Map what ``file`` holds, which may then be closed; ``path`` is its name in messages.

        Raises:
            DataError: it has a size that no tar has.
        """
        self.path = path
        facts = os.fstat(file.fileno())
        size, self.inode = facts.st_size, facts.st_ino
        if size == 0 or size % BLOCK:
            raise DataError(f"shard {path} has {size} bytes, which no tar has; restore it")
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.words: Words = np.frombuffer(self._map, dtype="<u4")
        self.wide: npt.NDArray[np.uint64] = np.frombuffer(self._map, dtype="<u8")

    def text(self, *, offset: int, size: int) -> str:
        """Member bytes as text.

        Raises:
            DataError: they are none.
        """
        try:
            return self._map[offset : offset + size].decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"shard {self.path} holds no text at byte {offset} ({error.reason}); restore it"
            ) from error


def tail_digest(tail: bytes) -> str | None:
    """The digest in the last :data:`TAIL` bytes of a shard, or None if no shard ends like that."""
    if tail[:BLOCK] != member_header(DIGEST_MEMBER, 64) or any(tail[2 * BLOCK :]):
        return None
    return tail[BLOCK : BLOCK + 64].decode("ascii", "replace")


def read_tail(file: BinaryIO) -> bytes:
    """The last :data:`TAIL` bytes of an open file, all of it if it has fewer."""
    file.seek(-min(TAIL, file.seek(0, os.SEEK_END)), os.SEEK_END)
    return file.read(TAIL)


def count_modalities(runs: Words) -> npt.NDArray[np.int64]:
    """Tokens of each modality in a run-length coded document, shape [len(Modality)]."""
    codes = (runs & ((1 << RUN_CODE_BITS) - 1)).astype(np.int64)
    counts = np.bincount(codes, weights=runs >> RUN_CODE_BITS, minlength=len(Modality))
    return counts.astype(np.int64)
