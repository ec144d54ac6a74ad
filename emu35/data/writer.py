"""Writing documents into shards: complete and indexed, or not there at all."""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from emu35.data.index import build_index
from emu35.data.shards import (
    BLOCK,
    DIGEST_MEMBER,
    META_MEMBER,
    ShardMeta,
    atomic_file,
    encode_runs,
    image_spans,
    member_header,
)
from emu35.errors import DataError
from emu35.tokens.serialize import TokenSequence

_SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class ShardWriter:
    """Appends documents to ``<stem>-NNNNNN.tar`` files of about ``shard_bytes`` each; the stem is
    the name of the source unless another is given.

    A shard appears under its name only when complete, followed by its index. Used as a context
    manager, an exception discards the shard being written and keeps the complete ones. Shards take
    the lowest numbers that are not in ``taken``.
    """

    def __init__(
        self,
        *,
        folder: Path,
        meta: ShardMeta,
        shard_bytes: int = 256 * 2**20,
        taken: Collection[int] = (),
        stem: str | None = None,
    ) -> None:
        if not _SOURCE_NAME.fullmatch(meta.source):
            raise DataError(
                f"source name {meta.source!r} cannot name a shard; "
                "use letters, digits, '_', '-' and '.'"
            )
        self.paths: list[Path] = []
        self._folder = folder
        self._meta = meta
        self._stem = stem or meta.source
        self._vocabulary = meta.vocabulary()
        self._shard_bytes = shard_bytes
        self._taken = taken
        self._number = self._free(0)
        self._documents = 0
        self._open = contextlib.ExitStack()
        self._file: BinaryIO | None = None
        self._sha = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def append(
        self, sequence: TokenSequence, *, document_id: str, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Add one document.

        Raises:
            DataError: if the sequence is empty, holds an id outside the vocabulary, or its
                pictures are malformed.
        """
        tokens = np.ascontiguousarray(sequence.tokens, dtype="<u4")
        if tokens.size == 0 or tokens.size != sequence.modality.size:
            raise DataError(
                f"document {document_id!r} has {tokens.size} tokens and "
                f"{sequence.modality.size} modality codes"
            )
        if int(tokens.max()) >= self._vocabulary.size:
            raise DataError(
                f"document {document_id!r} holds id {int(tokens.max())}, outside the vocabulary "
                f"of {self._vocabulary.size}"
            )
        spans = image_spans(sequence, vocabulary=self._vocabulary)
        facts: dict[str, Any] = {
            "id": document_id,
            "source": self._meta.source,
            "tokens": int(tokens.size),
            "images": [[span.start, span.end, span.rows, span.columns] for span in spans],
            **(extra or {}),
        }
        if self._file is None:
            self._begin()
        key = f"{self._number:06d}-{self._documents:06d}"
        runs = encode_runs(np.asarray(sequence.modality, dtype=np.uint8))
        self._member(f"{key}.tok", tokens.tobytes())
        self._member(f"{key}.mod", runs.astype("<u4").tobytes())
        self._member(f"{key}.json", json.dumps(facts, ensure_ascii=True).encode())
        self._documents += 1
        if self._size >= self._shard_bytes:
            self._finish()

    def close(self) -> list[Path]:
        """Complete the shard being written; return the paths of all shards written."""
        if self._file is not None:
            self._finish()
        return self.paths

    def abort(self) -> None:
        """Discard the shard being written."""
        self._open.__exit__(_Discard, _Discard(), None)
        self._file = None

    def _free(self, number: int) -> int:
        return next(n for n in itertools.count(number) if n not in self._taken)

    def _path(self) -> Path:
        return self._folder / f"{self._stem}-{self._number:06d}.tar"

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._open.enter_context(atomic_file(self._path()))
        self._sha = hashlib.sha256()
        self._size = 0
        self._documents = 0
        self._member(META_MEMBER, self._meta.to_json().encode())

    def _member(self, name: str, data: bytes) -> None:
        assert self._file is not None
        chunk = b"".join((member_header(name, len(data)), data, _padding(len(data))))
        try:
            self._file.write(chunk)
        except OSError as error:
            # Let the atomic file see it: it cleans up and names a full disk.
            self._open.__exit__(type(error), error, error.__traceback__)
            raise
        self._sha.update(chunk)
        self._size += len(chunk)

    def _finish(self) -> None:
        path = self._path()
        self._member(DIGEST_MEMBER, self._sha.hexdigest().encode())
        assert self._file is not None
        self._file.write(bytes(2 * BLOCK))
        self._file = None
        self._open.close()
        build_index(path)
        self.paths.append(path)
        self._number = self._free(self._number + 1)


class _Discard(Exception):
    """Tells the atomic file that the shard is not wanted."""


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)
