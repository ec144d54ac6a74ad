"""Writing documents into shards: complete and indexed, or not there at all."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emu35.data.index import build_index
from emu35.data.shards import META_MEMBER, ShardMeta, encode_runs, image_spans
from emu35.data.tar_writer import TarWriter, check_source_name
from emu35.errors import DataError
from emu35.tokens.serialize import TokenSequence


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
        check_source_name(meta.source)
        self._meta = meta
        self._vocabulary = meta.vocabulary()
        self._tar = TarWriter(
            folder=folder,
            stem=stem or meta.source,
            opening=(META_MEMBER, meta.to_json().encode()),
            shard_bytes=shard_bytes,
            taken=taken,
            finished=build_index,
        )

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._tar.__exit__(kind, error, trace)

    @property
    def paths(self) -> list[Path]:
        """The complete shards."""
        return self._tar.paths

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
        runs = encode_runs(np.asarray(sequence.modality, dtype=np.uint8))
        self._tar.append(
            {
                "tok": tokens.tobytes(),
                "mod": runs.astype("<u4").tobytes(),
                "json": json.dumps(facts, ensure_ascii=True).encode(),
            }
        )

    def close(self) -> list[Path]:
        """Complete the shard being written; return the paths of all shards written."""
        return self._tar.close()

    def abort(self) -> None:
        """Discard the shard being written."""
        self._tar.abort()
