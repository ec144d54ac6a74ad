"""A source as training sees it: a folder of shards, cut into items that fit a row."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emu35.config.data import Overlong
from emu35.data.index import ShardIndex, checksum_range, find_shards, read_index
from emu35.data.shards import BLOCK, NAME_BYTES, Codes, ShardFile, ShardMeta, Words, decode_runs
from emu35.data.split import PictureTooLong, cut_points
from emu35.errors import DataError
from emu35.tokens.serialize import Modality
from emu35.tokens.vocabulary import Vocabulary

Ints = npt.NDArray[np.int64]

# A mapped file holds a descriptor; a source may have more shards than a process may open files.
_MAPPED_SHARDS = 256


class Source:
    """The documents of all shards in a folder, numbered shard after shard.

    Attributes:
        length, shard: [N] tokens of each document and the shard it lies in.
        fingerprint: changes when any shard changes, is added, removed or reordered.
    """

    def __init__(self, *, name: str, path: Path, vocabulary: Vocabulary | None = None) -> None:
        """Open the indices of ``path``; with ``vocabulary``, refuse shards made with another.

        Raises:
            DataError: if a shard or an index is missing, damaged, or of another tokenizer.
        """
        self.name = name
        self.path = path
        self.shards: list[ShardIndex] = [read_index(shard) for shard in find_shards(path)]
        if vocabulary is not None:
            for shard in self.shards:
                _check_tokenizer(shard, vocabulary=vocabulary)
        self.metas: list[ShardMeta] = [shard.meta for shard in self.shards]
        self.documents_per_shard: Ints = np.array([len(s) for s in self.shards], dtype=np.int64)
        self.first_document: Ints = np.cumsum(self.documents_per_shard) - self.documents_per_shard
        self.length: Ints = np.concatenate([shard.length for shard in self.shards])
        self.shard: Ints = np.repeat(np.arange(len(self.shards)), self.documents_per_shard)
        self._token_word: Ints = np.concatenate([shard.token_word for shard in self.shards])
        self._run_word: Ints = np.concatenate([shard.run_word for shard in self.shards])
        self._runs: Ints = np.concatenate([shard.runs for shard in self.shards])
        self._checksum = np.concatenate([shard.checksum for shard in self.shards])
        digests = "".join(shard.digest for shard in self.shards)
        self.fingerprint = hashlib.sha256(digests.encode()).hexdigest()
        self._files: OrderedDict[int, ShardFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self.length)

    @property
    def modality(self) -> Ints:
        """[N, 4] tokens of each modality in each document."""
        return np.concatenate([shard.modality for shard in self.shards])

    def spans(self, document: int) -> Ints:
        """[M, 2] pictures of a document as half-open token ranges."""
        index, row = self.locate(document)
        return index.spans[index.span_row[row] : index.span_row[row + 1]]

    def locate(self, document: int) -> tuple[ShardIndex, int]:
        """The shard of a document and its row in that shard's index."""
        shard = int(self.shard[document])
        return self.shards[shard], document - int(self.first_document[shard])

    def describe(self, document: int) -> str:
        """A document's name for messages."""
        index, row = self.locate(document)
        return f"document {row} of {index.path.name}"

    def facts(self, document: int) -> str:
        """The JSON member of a document."""
        index, row = self.locate(document)
        file = self._file(int(self.shard[document]))
        return file.text(offset=int(index.json_byte[row]), size=int(index.json_size[row]))

    def record(self, document: int) -> dict[str, Any]:
        """The JSON member of a document, parsed: its ``id`` and ``images``, and what else was
        written with it.

        Raises:
            DataError: if it is not what was written; no checksum of the index covers it.
        """
        try:
            record: dict[str, Any] = json.loads(self.facts(document))
            whole = {"id", "images"} <= record.keys()
        except (ValueError, AttributeError):  # no JSON, or none of an object
            record, whole = {}, False
        if not whole:
            raise DataError(
                f"the JSON of {self.describe(document)} in {self.path} is damaged; see what else "
                f"is with `emu35 data validate {self.path}`, and restore the shard"
            )
        return record

    def member(self, document: int) -> str:
        """What the names of a document's members in the tar begin with, ``000000-000012`` say."""
        index, row = self.locate(document)
        header = 4 * int(index.token_word[row]) - BLOCK
        name = self._file(int(self.shard[document])).text(offset=header, size=NAME_BYTES)
        return name.split("\0")[0].removesuffix(".tok")

    def words(self, document: int) -> tuple[Words, Words]:
        """Token ids and modality runs of a document: views of the mapped shard, checked.

        Raises:
            DataError: if the bytes are not those that were indexed.
        """
        (pair,) = self.read(np.array([document]))
        return pair

    def codes(self, document: int) -> Codes:
        """Modality of each token of a document."""
        return decode_runs(self.words(document)[1])

    def read(self, documents: Ints) -> Iterator[tuple[Words, Words]]:
        """:meth:`words` of many documents, in the order given; the path that training takes."""
        reduce = np.bitwise_xor.reduce
        for document, shard, word, length, run_word, runs, checksum in zip(
            documents.tolist(),
            self.shard[documents].tolist(),
            self._token_word[documents].tolist(),
            self.length[documents].tolist(),
            self._run_word[documents].tolist(),
            self._runs[documents].tolist(),
            self._checksum[documents].tolist(),
            strict=True,
        ):
            file = self._file(shard)
            start, stop = checksum_range(token_word=word, run_word=run_word, runs=runs)
            if reduce(file.wide[start:stop]) != checksum:
                raise DataError(
                    f"{self.describe(document)} in {self.path} changed after it was indexed; "
                    f"check it with `emu35 data index {self.path} --verify` and restore it"
                )
            words = file.words
            yield words[word : word + length], words[run_word : run_word + runs]

    def _file(self, shard: int) -> ShardFile:
        files = self._files
        if shard in files:
            files.move_to_end(shard)
            return files[shard]
        if len(files) >= _MAPPED_SHARDS:
            files.popitem(last=False)
        return files.setdefault(shard, ShardFile(self.shards[shard].path))


@dataclass(frozen=True, kw_only=True, slots=True)
class TooLong:
    """Documents longer than a row: how many ``of`` how many, the longest (tokens), and the number
    of the first."""

    documents: int
    of: int
    longest: int
    first: int

    def describe(self, *, source: Source, limit: int) -> str:
        """The beginning of a sentence about them."""
        return (
            f"source {source.name!r} ({source.path}): {self.documents} of {self.of} documents are "
            f"longer than data.sequence_length={limit}; the longest has {self.longest} tokens, the "
            f"first is {source.describe(self.first)}"
        )


class Items:
    """The pieces that a source's documents become for rows of ``limit`` tokens. N items.

    Attributes:
        document, start, length: [N] the document, and the token range within it.
        per_shard: [shards] items in each shard.
        dropped: the documents that were left out for their length, None without any.
    """

    def __init__(
        self,
        *,
        source: Source,
        limit: int,
        documents: npt.NDArray[np.bool_] | None = None,
        overlong: Overlong = Overlong.cut,
    ) -> None:
        """``documents`` [N] limits the items to those documents, ``overlong`` says what becomes of
        those that are longer than ``limit``.

        Raises:
            DataError: if there are any and ``overlong`` refuses them, or cuts them and a picture
                alone exceeds ``limit``; naming how many documents and the first.
        """
        keep = np.ones(len(source), bool) if documents is None else documents
        self.dropped: TooLong | None = None
        if overlong is not Overlong.cut:
            self.dropped = _too_long(source, keep=keep, limit=limit)
            keep = keep & (source.length <= limit)
        if self.dropped is not None and overlong is Overlong.refuse:
            raise DataError(
                f"{self.dropped.describe(source=source, limit=limit)}. Raise data.sequence_length "
                f"to at least {self.dropped.longest}, or leave them out with data.overlong=drop"
            )
        counts = keep.astype(np.int64)
        cuts: dict[int, list[int]] = {}
        refused: list[tuple[int, int]] = []
        for document in np.flatnonzero(keep & (source.length > limit)).tolist():
            length = int(source.length[document])
            try:
                cuts[document] = cut_points(
                    length=length, spans=source.spans(document), limit=limit
                )
                counts[document] = len(cuts[document])
            except PictureTooLong as error:
                refused.append((document, error.length))
        if refused:
            first, length = refused[0]
            raise DataError(
                f"source {source.name!r} ({source.path}) has {len(refused)} documents with a "
                f"picture longer than data.sequence_length={limit}; the first is "
                f"{source.describe(first)} with a picture of {length} tokens. Raise "
                f"data.sequence_length to at least {length}, or ingest again with a smaller area"
            )
        self.document: Ints = np.repeat(np.arange(len(source)), counts)
        self.start: Ints = np.zeros(len(self.document), np.int64)
        self.length: Ints = source.length[self.document].copy()
        first_item = np.cumsum(counts) - counts
        for document, starts in cuts.items():
            begin = int(first_item[document])
            ends = [*starts[1:], int(source.length[document])]
            self.start[begin : begin + len(starts)] = starts
            self.length[begin : begin + len(starts)] = np.array(ends) - np.array(starts)
        shard = source.shard[self.document]
        self.per_shard: Ints = np.bincount(shard, minlength=len(source.shards)).astype(np.int64)

    def __len__(self) -> int:
        return len(self.document)


def _too_long(source: Source, *, keep: npt.NDArray[np.bool_], limit: int) -> TooLong | None:
    documents = np.flatnonzero(keep & (source.length > limit))
    if not len(documents):
        return None
    return TooLong(
        documents=len(documents),
        of=int(keep.sum()),
        longest=int(source.length[documents].max()),
        first=int(documents[0]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBy:
    """SHA-256 of the weights of the image tokenizer that made the codes, and a shard of them."""

    digest: str
    shard: Path


def check_vision(sources: Sequence[Source]) -> EncodedBy | None:
    """The image tokenizer that encoded the pictures of all ``sources``; None if none is recorded.

    Raises:
        DataError: there are several; two of them are named.
    """
    found: dict[str, Path] = {}
    for source in sources:
        for shard in source.shards:
            if shard.meta.vision is not None and bool(shard.modality[:, Modality.VISUAL].any()):
                found.setdefault(shard.meta.vision, shard.path)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise DataError(
            f"shards {first} and {second} hold pictures encoded by different image tokenizers "
            f"(weights {one[:12]} and {other[:12]}); ingest them again with the same one"
        )
    return next((EncodedBy(digest=one, shard=first) for one, first in found.items()), None)


def _check_tokenizer(shard: ShardIndex, *, vocabulary: Vocabulary) -> None:
    meta = shard.meta
    if (meta.n_text, meta.codebook_size) != (vocabulary.n_text, vocabulary.codebook_size):
        raise DataError(
            f"shard {shard.path} was made with tokenizer kind={meta.kind} ({meta.n_text} text ids)"
            f" and codebook_size={meta.codebook_size}, but this run has {vocabulary.n_text} text "
            f"ids and codebook_size={vocabulary.codebook_size}; set tokenizer.kind and "
            "tokenizer.codebook_size as the shard has them, or ingest again"
        )
    if shard.max_token >= vocabulary.size:
        raise DataError(
            f"shard {shard.path} holds id {shard.max_token}, outside the vocabulary of "
            f"{vocabulary.size}; it was not written by `emu35 data ingest` for this tokenizer"
        )
