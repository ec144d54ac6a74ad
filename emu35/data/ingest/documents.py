"""From the records of an input to token sequences, which is all of the work but the shards."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from emu35.data.ingest.options import Dedup, IngestOptions, PairOrder
from emu35.data.ingest.pictures import EncodedRecord, PictureEncoder, PictureStage
from emu35.data.ingest.product import Outcome
from emu35.data.readers.clips import gather_clips
from emu35.data.readers.discover import InputFile
from emu35.data.readers.records import RawRecord, Reason, RecordForm, Reject
from emu35.tokens.document import Document, Image, Part, Text
from emu35.tokens.serialize import TokenSequence, join_parts, serialize
from emu35.tokens.text import TextTokenizer

FOLDERS: dict[PairOrder, dict[str, PairOrder]] = {
    PairOrder.caption_first: {".": PairOrder.caption_first},
    PairOrder.image_first: {".": PairOrder.image_first},
    PairOrder.both: {
        order.value: order for order in (PairOrder.caption_first, PairOrder.image_first)
    },
}
"""What is asked for -> shard folders below the output folder, and the order of pairs in each."""

_PARAGRAPH = "\n\n"
"""Between two clips that meet with text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A document: a sequence for each shard folder, and the hash by which duplicates are found
    (empty where it has none)."""

    id: str
    sequences: tuple[TokenSequence, ...]
    hash: bytes


@dataclass(kw_only=True, slots=True)
class _Video:
    """Clips that follow each other in a document; ``parts`` of each, with its pictures' hashes."""

    id: str
    pair: list[bool] = field(default_factory=list[bool])
    parts: list[list[Part]] = field(default_factory=list[list[Part]])
    hashes: list[bytes] = field(default_factory=list[bytes])


@dataclass(kw_only=True, slots=True)
class DocumentStage:
    """Reads an input and makes documents of it; the same input gives the same outcomes."""

    options: IngestOptions
    tokenizer: TextTokenizer
    encoder: PictureEncoder | None

    def run(self, source: InputFile) -> Iterator[Outcome[Ready]]:
        """Outcomes in the order of the records.

        Raises:
            DataError: if there is a picture and no encoder.
        """
        stage = PictureStage(
            encoder=self.encoder,
            images_per_call=self.options.images_per_call,
            threads=self.options.threads,
            sequence_length=self.options.sequence_length,
            codebook_size=self.options.tokenizer.codebook_size,
            hashing=self.options.dedup is Dedup.picture,
        )
        video: _Video | None = None
        last = 0
        for found in stage.run(self._records(source)):
            if isinstance(found, Reject):
                last = found.offset
                yield Outcome(offset=last, records=1, rejects=[found])
                continue
            record = found.record
            last = record.offset
            outcome = Outcome[Ready](offset=last, records=len(record.several) or 1)
            if video is not None and video.id != record.group:
                self._finish(video, outcome=outcome)
                video = None
            if record.group:
                video = video or _Video(id=record.group)
                for _, parts, hashes in found.documents():
                    video.pair.append(record.form is RecordForm.pair)
                    video.parts.append(parts)
                    video.hashes.append(hashes)
            else:
                self._add(found, outcome=outcome)
            yield outcome
        if video is not None:
            outcome = Outcome[Ready](offset=last, records=0)
            self._finish(video, outcome=outcome)
            yield outcome

    def _records(self, source: InputFile) -> Iterator[RawRecord | Reject]:
        clips = self.options.clips
        return source.read() if clips is None else gather_clips(source.read(), fields=clips)

    def _add(self, found: EncodedRecord, *, outcome: Outcome[Ready]) -> None:
        form = found.record.form
        orders = list(FOLDERS[self.options.order].values())
        for id, parts, hashes in found.documents():
            if len(orders) > 1 and form is not RecordForm.pair:
                outcome.rejects.append(Reject(id=id, reason=Reason.not_a_pair))
                continue
            sequences = tuple(
                self._sequence(_ordered(parts, order=order, pair=form is RecordForm.pair), id=id)
                for order in orders
            )
            tokens = len(sequences[0])
            if form is RecordForm.task and 0 < self.options.sequence_length < tokens:
                outcome.rejects.append(self._too_long(id, tokens=tokens))
                continue
            outcome.documents.append(self._ready(id, sequences=sequences, hashes=hashes))

    def _finish(self, video: _Video, *, outcome: Outcome[Ready]) -> None:
        """Make documents of the clips of a video."""
        orders = list(FOLDERS[self.options.order].values())
        if len(orders) > 1 and not all(video.pair):
            outcome.rejects.append(Reject(id=video.id, reason=Reason.not_a_pair))
            return
        for first, end in self._stretches(video):
            sequences = tuple(
                self._sequence(_joined(video, first, end, order=order), id=video.id)
                for order in orders
            )
            id = f"{video.id}#from_clip_{first + 1}" if first else video.id
            hashes = b"".join(video.hashes[first:end])
            outcome.documents.append(self._ready(id, sequences=sequences, hashes=hashes))

    def _stretches(self, video: _Video) -> Iterator[tuple[int, int]]:
        """First clip and one past the last of each document; a clip that is too long by itself is
        one alone."""
        limit, total = self.options.sequence_length, len(video.parts)
        if not limit:
            yield 0, total
            return
        between = len(self.tokenizer.encode(_PARAGRAPH))
        first, tokens = 0, 2
        for number, parts in enumerate(video.parts):
            length = len(join_parts(parts, self.tokenizer)) + between
            if number > first and tokens + length > limit:
                yield first, number
                first, tokens = number, 2
            tokens += length
        yield first, total

    def _sequence(self, parts: list[Part], *, id: str) -> TokenSequence:
        return serialize(Document(parts, source=self.options.source, id=id), self.tokenizer)

    def _ready(self, id: str, *, sequences: tuple[TokenSequence, ...], hashes: bytes) -> Ready:
        content = {
            Dedup.none: b"",
            # What a token is follows from its id, so ids are all of it.
            Dedup.record: sequences[0].tokens.tobytes(),
            Dedup.picture: hashes,
        }[self.options.dedup]
        hash = hashlib.sha256(content).digest() if content else b""
        return Ready(id=id, sequences=sequences, hash=hash)

    def _too_long(self, id: str, *, tokens: int) -> Reject:
        detail = (
            f"{tokens} tokens, above {self.options.sequence_length}, and a response without its "
            "end teaches to break off; lower the area, or split the record"
        )
        return Reject(id=id, reason=Reason.task_too_long, detail=detail)


def _ordered(parts: Sequence[Part], *, order: PairOrder, pair: bool) -> list[Part]:
    """The parts, those of a pair in the order asked for."""
    if not pair:
        return list(parts)
    image_first = order is PairOrder.image_first
    return sorted(parts, key=lambda part: isinstance(part, Image) is not image_first)


def _joined(video: _Video, first: int, end: int, *, order: PairOrder) -> list[Part]:
    joined: list[Part] = []
    for parts, pair in zip(video.parts[first:end], video.pair[first:end], strict=True):
        clip = _ordered(parts, order=order, pair=pair)
        if joined and isinstance(joined[-1], Text) and isinstance(clip[0], Text):
            joined.append(Text(_PARAGRAPH))
        joined += clip
    return joined
