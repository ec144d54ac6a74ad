"""A source as training sees it: a folder of shards, and the documents in it by number.

Damage (:class:`~emu35.config.data.Damaged`) is found at two moments. Opening finds shards that are
not what their index says; left out, they are no part of the fingerprint, so that all ranks and a
resumed run must find the same ones. Reading finds documents with altered bytes; in their place
stand no tokens, which changes nothing for any other document. Local tars are mapped: one that is
cut short in place, under a running job, ends it with SIGBUS, which no code can answer. Replace
shards by renaming, as everything here does.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emu35.config.data import CacheConfig, Damaged
from emu35.data.cache import Unreachable
from emu35.data.index import checksum_of, checksum_range, read_indices
from emu35.data.index_file import ShardIndex, packed_length
from emu35.data.pieces import Piece, read_pieces
from emu35.data.place import Place
from emu35.data.shards import BLOCK, NAME_BYTES, Codes, ShardFile, ShardMeta, Words, decode_runs
from emu35.data.storage import Message, RemoteFolder, open_folder
from emu35.errors import DataError
from emu35.tokens.serialize import Modality
from emu35.tokens.vocabulary import Vocabulary

Ints = npt.NDArray[np.int64]

# A mapped file holds a descriptor; a source may have more shards than a process may open files.
_MAPPED_SHARDS = 256
_MARK = -1
_NO_WORDS: Words = np.zeros(0, np.uint32)


def say_nothing(text: str) -> None:
    """A :data:`~emu35.data.storage.Message` that nobody hears."""
    del text


class Source:
    """The documents of all shards in a folder, numbered shard after shard.

    In a folder that `emu35 data pack` wrote, what is called a document here is a whole row of
    them; :meth:`pieces` are those of a row.

    Attributes:
        packed: the length of the rows that the documents were packed into; None: they were not.
        length, shard: [N] tokens of each document and the shard it lies in.
        fingerprint: changes when any shard changes, is added, removed or reordered.
        damaged: shards that are left out, and why.
        damaged_documents: numbers of documents that turned out altered when they were read.
    """

    def __init__(
        self,
        *,
        name: str,
        path: Place,
        vocabulary: Vocabulary | None = None,
        damaged: Damaged = Damaged.refuse,
        cache: CacheConfig | None = None,
        message: Message = say_nothing,
        alarm: Message | None = None,
    ) -> None:
        """Open the indices of ``path``; with ``vocabulary``, refuse shards made with another.

        ``message`` hears at once of shards that are left out, ``alarm`` (``message`` without it)
        later of documents that are.

        Raises:
            DataError: if shards or indices are missing or damaged (every one is named) and
                ``damaged`` refuses them or none is left, or are of another tokenizer.
        """
        self.name = name
        self.path = path
        self._policy, self._alarm = damaged, alarm or message
        self._folder = open_folder(path, cache=cache, message=message)
        self.shards, self.damaged = read_indices(self._folder)
        _judge(self, policy=damaged, message=message)
        if vocabulary is not None:
            for shard in self.shards:
                _check_tokenizer(shard, vocabulary=vocabulary)
        self.metas: list[ShardMeta] = [shard.meta for shard in self.shards]
        self.packed = packed_length(self.shards)
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
        self.damaged_documents: set[int] = set()
        # Least recently used first; what lies behind _MARK was used since a shard was last mapped.
        self._files: OrderedDict[int, ShardFile | None] = OrderedDict()
        self._lost: set[int] = set()
        self._renewals: set[int] = set()

    def __len__(self) -> int:
        return len(self.length)

    @property
    def modality(self) -> Ints:
        """[N, 4] tokens of each modality in each document."""
        return np.concatenate([shard.modality for shard in self.shards])

    @property
    def pictures(self) -> Ints:
        """[N] pictures in each document."""
        return np.concatenate([np.diff(shard.span_row) for shard in self.shards])

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
        kind = "document" if self.packed is None else "row"
        return f"{kind} {row} of {index.path.name}"

    def facts(self, document: int) -> str:
        """The JSON member of a document."""
        index, row = self.locate(document)
        file = self._file(int(self.shard[document]))
        if file is None:
            raise DataError(f"{self.describe(document)} in {self.path} cannot be read any more")
        return file.text(offset=int(index.json_byte[row]), size=int(index.json_size[row]))

    def pieces(self, row: int) -> list[Piece]:
        """The documents, and parts of documents, in a row of a packed source.

        Raises:
            DataError: if they are not those that were indexed.
        """
        try:
            return read_pieces(json.loads(self.facts(row)))
        except (LookupError, ValueError, TypeError) as error:
            raise DataError(
                f"{self.describe(row)} in {self.path} changed after it was indexed ({error}); "
                f"check it with `emu35 data index {self.path} --verify` and restore it"
            ) from error

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
        file = self._file(int(self.shard[document]))
        if file is None:
            raise DataError(f"{self.describe(document)} in {self.path} cannot be read any more")
        name = file.text(offset=header, size=NAME_BYTES)
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
        """:meth:`words` of many documents, in the order given; the path that training takes.

        With ``damaged=skip``, a document that cannot be read has no words and no runs. One that
        comes several times in a row is checked once, and gives the same pair.
        """
        before, pair = -1, (_NO_WORDS, _NO_WORDS)
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
            if document == before:
                yield pair
                continue
            file = self._file(shard)
            if file is None:
                self.damaged_documents.add(document)
                yield _NO_WORDS, _NO_WORDS
                continue
            start, stop = checksum_range(token_word=word, run_word=run_word, runs=runs)
            if checksum_of(file.wide[start:stop]) != checksum:
                file = self._renewed(shard)
                if file is None or checksum_of(file.wide[start:stop]) != checksum:
                    self.leave_out(document)
                    yield _NO_WORDS, _NO_WORDS
                    continue
            words = file.words
            before = document
            pair = words[word : word + length], words[run_word : run_word + runs]
            yield pair

    def leave_out(self, document: int) -> None:
        """Count and tell of a document whose bytes are not those that were indexed, once.

        Raises:
            DataError: ``damaged`` refuses it.
        """
        text = f"{self.describe(document)} in {self.path} changed after it was indexed"
        remedy = f"check it with `emu35 data index {self.path} --verify` and restore it"
        if self._policy is Damaged.refuse:
            raise DataError(f"{text}; {remedy}, or go on without it with data.damaged=skip")
        if document not in self.damaged_documents:
            self.damaged_documents.add(document)
            self._alarm(
                f"source {self.name!r}: {text}; its {self.length[document]} tokens are left out "
                f"(data.damaged=skip, number {len(self.damaged_documents)} so far); {remedy}"
            )

    def _file(self, shard: int) -> ShardFile | None:
        """The mapped shard; None for one that cannot be opened any more and is to be skipped."""
        files = self._files
        if shard in files:
            files.move_to_end(shard)
            return files[shard]
        if shard in self._lost:
            return None
        if isinstance(self._folder, RemoteFolder):
            self._look_after(self._folder)
        while len(files) >= _MAPPED_SHARDS:
            files.popitem(last=False)
        index = self.shards[shard]
        try:
            with self._folder.open(
                index.path.name, size=index.tar_bytes, digest=index.digest
            ) as file:
                mapped = ShardFile(index.path, file=file)
            if mapped.words.nbytes != index.tar_bytes:
                raise DataError(
                    f"shard {index.path} has {mapped.words.nbytes} bytes but its index was made "
                    f"for {index.tar_bytes}; restore it"
                )
        except Unreachable:
            raise
        except DataError as error:
            if self._policy is Damaged.refuse:
                raise
            self._lost.add(shard)
            self._alarm(
                f"source {self.name!r}: {error}. Its {len(index)} documents are left out from now "
                "on (data.damaged=skip)"
            )
            return None
        files[shard] = mapped
        return mapped

    def _look_after(self, folder: RemoteFolder) -> None:
        """Before another shard is mapped: keep what was used since the last time in the cache, and
        let go of what the cache has removed, since a map holds the space."""
        files = self._files
        used = True
        for shard in reversed(list(files)):
            if shard == _MARK:
                used = False
                continue
            index = self.shards[shard]
            if used:
                folder.touch(index.path.name, digest=index.digest)
            elif folder.gone(index.path.name, digest=index.digest):
                del files[shard]
        # Whatever is used from here on comes to lie behind the mark.
        files[_MARK] = None
        files.move_to_end(_MARK)

    def _renewed(self, shard: int) -> ShardFile | None:
        """A shard mapped from another copy, once; None where it was no copy or was renewed."""
        if shard in self._renewals or not isinstance(self._folder, RemoteFolder):
            return None
        self._renewals.add(shard)
        index, old = self.shards[shard], self._files[shard]
        assert old is not None
        try:
            file = self._folder.renew(
                index.path.name, size=index.tar_bytes, digest=index.digest, seen=old.inode
            )
        except Unreachable:
            raise
        except DataError:
            if self._policy is Damaged.refuse:
                raise
            return None  # the document is left out, and told of
        with file:
            fresh = self._files[shard] = ShardFile(index.path, file=file)
        return fresh


def _judge(source: Source, *, policy: Damaged, message: Message) -> None:
    """Tell what is left out, or raise DataError naming every damaged shard."""
    damaged = source.damaged
    if not damaged:
        return
    if len(damaged) == 1 and policy is Damaged.refuse:
        raise DataError(damaged[0].reason)
    total = len(damaged) + len(source.shards)
    lines = "".join(f"\n  - {shard.name}: {shard.reason}" for shard in damaged)
    head = f"source {source.name!r} ({source.path}): {len(damaged)} of {total} shards"
    if policy is Damaged.refuse:
        raise DataError(
            f"{head} cannot be used; restore them, or leave them out with data.damaged=skip{lines}"
        )
    if not source.shards:
        raise DataError(f"{head} are damaged, so that data.damaged=skip leaves nothing{lines}")
    message(f"{head} are left out (data.damaged=skip){lines}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBy:
    """SHA-256 of the weights of the image tokenizer that made the codes, and a shard of them."""

    digest: str
    shard: Place


def check_vision(sources: Sequence[Source]) -> EncodedBy | None:
    """The image tokenizer that encoded the pictures of all ``sources``; None if none is recorded.

    Raises:
        DataError: there are several; two of them are named.
    """
    found: dict[str, Place] = {}
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
