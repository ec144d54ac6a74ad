"""Documents as token shards: what ``emu35 data ingest`` makes."""

import functools
import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emu35.data.ingest.documents import DocumentStage, Ready
from emu35.data.ingest.manifest import Manifest
from emu35.data.ingest.options import IngestOptions
from emu35.data.ingest.pictures import PictureEncoder
from emu35.data.ingest.product import Counts, Outcome
from emu35.data.readers.discover import InputFile
from emu35.data.shards import ShardMeta, decode_runs, encode_runs
from emu35.data.writer import ShardWriter
from emu35.tokens.serialize import Modality, TokenSequence
from emu35.tokens.text import TextTokenizer, build_text_tokenizer


class TokenShards:
    """A :class:`~emu35.data.ingest.product.Product`: a document for every record or several, each
    a sequence for every shard folder."""

    noun = "document"
    unit = ""

    def __init__(self, *, options: IngestOptions, encoder: PictureEncoder | None) -> None:
        self._options = options
        self._encoder = encoder

    def __getstate__(self) -> dict[str, Any]:
        # The text tokenizer is made anew where it is needed: that is quicker than to send it.
        return {"_options": self._options, "_encoder": self._encoder}

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """Raises: TokenizerError if the text table is missing."""
        return build_text_tokenizer(self._options.tokenizer)

    def join(self, *, worker: int, workers: int) -> None:
        """Let the encoder take its share."""
        if self._encoder is not None:
            self._encoder.join(worker=worker, workers=workers)

    def outcomes(self, source: InputFile) -> Iterator[Outcome[Ready]]:
        """Raises: DataError if there is a picture and no encoder."""
        stage = DocumentStage(
            options=self._options, tokenizer=self.tokenizer, encoder=self._encoder
        )
        return stage.run(source)

    def units(self, item: Ready) -> int:
        """Nothing besides documents is counted."""
        del item
        return 0

    def pack(self, item: Ready) -> bytes:
        """A line of JSON, then ids (uint32) and modalities (run-length coded, as in shards)."""
        parts: list[bytes] = []
        sizes: list[tuple[int, int]] = []
        for sequence in item.sequences:
            tokens = np.ascontiguousarray(sequence.tokens, dtype="<u4").tobytes()
            runs = encode_runs(np.asarray(sequence.modality, dtype=np.uint8)).astype("<u4")
            parts += [tokens, runs.tobytes()]
            sizes.append((len(tokens), runs.nbytes))
        head = json.dumps({"id": item.id, "hash": item.hash.hex(), "sizes": sizes})
        return b"".join([head.encode(), b"\n", *parts])

    def unpack(self, data: bytes) -> Ready:
        """Inverse of :meth:`pack`."""
        end = data.index(b"\n")
        head: dict[str, Any] = json.loads(data[:end])
        sequences: list[TokenSequence] = []
        at = end + 1
        for tokens, runs in head["sizes"]:
            middle, after = at + tokens, at + tokens + runs
            ids = np.frombuffer(data[at:middle], "<u4")
            modality = decode_runs(np.frombuffer(data[middle:after], "<u4"))
            sequences.append(TokenSequence(ids, modality))
            at = after
        return Ready(id=head["id"], hash=bytes.fromhex(head["hash"]), sequences=tuple(sequences))

    @contextmanager
    def open(self, manifest: Manifest, *, source: InputFile) -> Generator["_Sink", None, None]:
        """Shards in each of the folders."""
        del source
        with ExitStack() as stack:
            writers = [
                stack.enter_context(self._writer(folder, manifest=manifest))
                for folder in manifest.folders
            ]
            yield _Sink(writers=writers)

    def _writer(self, folder: str, *, manifest: Manifest) -> ShardWriter:
        config = self._options.tokenizer
        meta = ShardMeta(
            source=self._options.source,
            kind=config.kind.value,
            n_text=self.tokenizer.vocabulary.n_text,
            codebook_size=config.codebook_size,
            vision=self._encoder.digest if self._encoder is not None else None,
            vision_dtype=self._encoder.dtype if self._encoder is not None else None,
        )
        return ShardWriter(
            folder=manifest.staging / folder,
            meta=meta,
            shard_bytes=self._options.shard_bytes,
            taken=manifest.shard_numbers(folder),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sink:
    """A writer for each folder."""

    writers: Sequence[ShardWriter]

    @property
    def paths(self) -> list[Path]:
        return [path for writer in self.writers for path in writer.paths]

    def add(self, item: Ready) -> Counts:
        for writer, sequence in zip(self.writers, item.sequences, strict=True):
            writer.append(sequence, document_id=item.id)
        modalities = [sequence.modality for sequence in item.sequences]
        return Counts(
            documents=len(item.sequences),
            tokens=sum(map(len, item.sequences)),
            visual_tokens=sum(int(np.count_nonzero(m == Modality.VISUAL)) for m in modalities),
        )
