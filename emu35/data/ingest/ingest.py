"""One ingestion from options to shards and a summary."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from emu35.data.ingest.manifest import DoneInput, Manifest, lock_folder, open_books
from emu35.data.ingest.options import Existing, IngestOptions, IngestSummary, PairOrder
from emu35.data.ingest.pictures import EncodedRecord, PictureEncoder, PictureStage
from emu35.data.ingest.progress import Progress
from emu35.data.readers.discover import InputFile, find_inputs
from emu35.data.readers.records import Reason, RecordForm, Reject
from emu35.data.shards import ShardMeta, atomic_file
from emu35.data.writer import ShardWriter
from emu35.errors import DataError
from emu35.log.console import Console
from emu35.tokens.document import Document, Image, Part
from emu35.tokens.serialize import Modality, serialize
from emu35.tokens.text import TextTokenizer, build_text_tokenizer

REJECTS = "rejects.jsonl"
_KIND = "rejects"
"""Folder of the books for the rejects of each input."""


def ingest(options: IngestOptions, *, encoder: PictureEncoder | None) -> IngestSummary:
    """Turn inputs into token shards; see the package for what an interruption leaves behind.

    Args:
        encoder: makes codes of pictures; None where the inputs hold no picture.

    Raises:
        ConfigError: for impossible options.
        DataError: if inputs are missing, the output folder cannot be used, an input has too many
            rejects, or nothing at all could be ingested.
        TokenizerError: if the text table is missing.
    """
    begin = time.monotonic()
    options.validate()
    inputs = find_inputs(
        options.inputs,
        text_unit=options.text_unit,
        starts=options.starts,
        layout=options.layout,
    )
    _require_encoder(inputs, encoder=encoder)
    tokenizer = build_text_tokenizer(options.tokenizer)
    if encoder is not None and options.existing is Existing.replace:
        encoder.check()
    with lock_folder(options.out):
        manifest = open_books(
            out=options.out,
            folders=_FOLDERS[options.order],
            identity=_identity(options, encoder=encoder),
            existing=options.existing,
        )
        # Changed inputs are refused before anything is dropped for being damaged.
        for source in inputs:
            manifest.find(source)
        console = Console(stream=sys.stderr)
        for line in manifest.drop_damaged(inputs):
            console.line(line)
        todo = [source for source in inputs if manifest.find(source) is None]
        job = _Job(options=options, tokenizer=tokenizer, encoder=encoder, manifest=manifest)
        failures = job.run(todo, skipped_bytes=sum(s.size for s in inputs if s not in todo))
        _join_rejects(manifest, failed=[source for source, _ in failures])
    summary = _summary(manifest, inputs=len(inputs), todo=len(todo), begin=begin)
    rejects = options.out / REJECTS
    kept = ". The earlier shards were kept" if manifest.retired else ""
    if failures:
        raise DataError(
            "; ".join(message for _, message in failures)
            + f". Reasons are in {rejects}; the other inputs are done. "
            f"Mend the input, or raise --max-rejects{kept}"
        )
    if summary.documents == 0:
        raise DataError(
            f"{len(inputs)} inputs gave no document at all; reasons are in {rejects}{kept}"
        )
    return summary


def _require_encoder(inputs: Sequence[InputFile], *, encoder: PictureEncoder | None) -> None:
    """Raises: DataError if there is no encoder and an input is bound to need one."""
    pictures = next((source for source in inputs if source.is_of_pictures), None)
    if encoder is None and pictures is not None:
        raise DataError(
            f"input {pictures.path} holds pictures, but no image tokenizer was given; "
            "name its folder with --vision (tokenizer.vision)"
        )


_FOLDERS = {
    PairOrder.caption_first: ["."],
    PairOrder.image_first: ["."],
    PairOrder.both: [PairOrder.caption_first.value, PairOrder.image_first.value],
}
"""Shard folders below the output folder."""


@dataclass(kw_only=True, slots=True)
class _Tally:
    """Counts over one input."""

    documents: int = 0
    tokens: int = 0
    visual_tokens: int = 0
    records: int = 0
    rejects: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(kw_only=True, slots=True)
class _Output:
    """One shard folder: its writer, and how it orders a picture and its caption."""

    folder: str
    order: PairOrder
    writer: ShardWriter


@dataclass(kw_only=True, slots=True)
class _Job:
    """The parts of a running ingestion."""

    options: IngestOptions
    tokenizer: TextTokenizer
    encoder: PictureEncoder | None
    manifest: Manifest

    def run(
        self, inputs: Sequence[InputFile], *, skipped_bytes: int
    ) -> list[tuple[InputFile, str]]:
        """Ingest one input after the other; returns those not committed, with what was wrong."""
        failures: list[tuple[InputFile, str]] = []
        progress = Progress(
            label=f"ingest {self.options.source}",
            total=skipped_bytes + sum(source.size for source in inputs),
            items="documents",
        )
        progress.skip(skipped_bytes)
        try:
            for source in inputs:
                progress.begin(size=source.size)
                entry, records = self._ingest_input(source, progress=progress)
                rejected = sum(entry.rejects.values())
                if rejected > self.options.max_rejects * records:
                    message = (
                        f"input {source.path} had {rejected} of {records} records rejected, above "
                        f"max_rejects={self.options.max_rejects}, and was left out"
                    )
                    failures.append((source, message))
                    self.manifest.clear_staging()
                else:
                    self.manifest.commit(entry)
        finally:
            progress.close()
        return failures

    def _ingest_input(self, source: InputFile, *, progress: Progress) -> tuple[DoneInput, int]:
        """Write the shards of one input into the staging folder; also returns the record count."""
        tally = _Tally()
        stage = PictureStage(
            encoder=self.encoder,
            images_per_call=self.options.images_per_call,
            threads=self.options.threads,
            sequence_length=self.options.sequence_length,
        )
        with ExitStack() as stack:
            notes = self.manifest.notes(_KIND, path=source.path)
            file = stack.enter_context(atomic_file(notes))
            outputs = [self._output(folder, stack=stack) for folder in self.manifest.folders]
            for outcome in stage.run(source.read()):
                if isinstance(outcome, EncodedRecord):
                    offset = outcome.record.offset
                    tally.records += len(outcome.record.several) or 1
                    rejects = list(self._write(outcome, outputs=outputs, tally=tally))
                else:
                    offset, rejects = outcome.offset, [outcome]
                    tally.records += 1
                for reject in rejects:
                    reason = str(reject.reason)
                    tally.rejects[reason] = tally.rejects.get(reason, 0) + 1
                    line = {
                        "input": str(source.path),
                        "id": reject.id,
                        "reason": reason,
                        "detail": reject.detail,
                    }
                    file.write(json.dumps(line).encode() + b"\n")
                progress.update(offset, items=tally.documents)
        entry = DoneInput(
            path=str(source.path),
            fingerprint=source.fingerprint,
            shards=[
                path.relative_to(self.manifest.staging).as_posix()
                for output in outputs
                for path in output.writer.paths
            ],
            documents=tally.documents,
            tokens=tally.tokens,
            visual_tokens=tally.visual_tokens,
            rejects=tally.rejects,
        )
        return entry, tally.records

    def _output(self, folder: str, *, stack: ExitStack) -> _Output:
        config = self.options.tokenizer
        meta = ShardMeta(
            source=self.options.source,
            kind=config.kind.value,
            n_text=self.tokenizer.vocabulary.n_text,
            codebook_size=config.codebook_size,
            vision=self.encoder.digest if self.encoder is not None else None,
        )
        writer = ShardWriter(
            folder=self.manifest.staging / folder,
            meta=meta,
            shard_bytes=self.options.shard_bytes,
            taken=self.manifest.shard_numbers(folder),
        )
        order = self.options.order if folder == "." else PairOrder(folder)
        return _Output(folder=folder, order=order, writer=stack.enter_context(writer))

    def _write(
        self, encoded: EncodedRecord, *, outputs: Sequence[_Output], tally: _Tally
    ) -> Iterator[Reject]:
        """Write the documents of a record, and yield those that cannot be."""
        form = encoded.record.form
        for id, parts in encoded.documents():
            if len(outputs) > 1 and form is not RecordForm.pair:
                yield Reject(id=id, reason=Reason.not_a_pair)
                continue
            for output in outputs:
                ordered = _ordered(parts, order=output.order) if form is RecordForm.pair else parts
                document = Document(ordered, source=self.options.source, id=id)
                sequence = serialize(document, self.tokenizer)
                if form is RecordForm.task and 0 < self.options.sequence_length < len(sequence):
                    yield self._too_long(id, tokens=len(sequence))
                    continue
                output.writer.append(sequence, document_id=id)
                tally.documents += 1
                tally.tokens += len(sequence)
                tally.visual_tokens += int(np.count_nonzero(sequence.modality == Modality.VISUAL))

    def _too_long(self, id: str, *, tokens: int) -> Reject:
        detail = (
            f"{tokens} tokens, above {self.options.sequence_length}, and a response without its "
            "end teaches to break off; lower the area, or split the record"
        )
        return Reject(id=id, reason=Reason.task_too_long, detail=detail)


def _ordered(parts: list[Part], *, order: PairOrder) -> list[Part]:
    """The parts of a pair in the order asked for."""
    image_first = order is PairOrder.image_first
    return sorted(parts, key=lambda part: isinstance(part, Image) is not image_first)


def _identity(options: IngestOptions, *, encoder: PictureEncoder | None) -> dict[str, Any]:
    """The options that decide what a document becomes; a rerun must repeat them."""
    area = options.area
    return {
        "source": options.source,
        "tokenizer": options.tokenizer.kind.value,
        "codebook_size": options.tokenizer.codebook_size,
        "vision": encoder.digest if encoder is not None else None,
        "area": area.most if area.least == area.most else f"{area.least}..{area.most}",
        "order": options.order.value,
        "text_unit": options.text_unit.value,
        "starts": options.starts.value,
        "layout": options.layout.value if options.layout is not None else None,
        "sequence_length": options.sequence_length,
    }


def _join_rejects(manifest: Manifest, *, failed: Sequence[InputFile]) -> None:
    """Write ``rejects.jsonl`` anew from the rejects of each input."""
    paths = [Path(entry.path) for entry in manifest.done] + [source.path for source in failed]
    with atomic_file(manifest.out / REJECTS) as file:
        for path in paths:
            found = manifest.notes(_KIND, path=path)
            if found.is_file():
                file.write(found.read_bytes())


def _summary(manifest: Manifest, *, inputs: int, todo: int, begin: float) -> IngestSummary:
    rejects: dict[str, int] = {}
    for entry in manifest.done:
        for reason, count in entry.rejects.items():
            rejects[reason] = rejects.get(reason, 0) + count
    return IngestSummary(
        documents=sum(entry.documents for entry in manifest.done),
        tokens=sum(entry.tokens for entry in manifest.done),
        visual_tokens=sum(entry.visual_tokens for entry in manifest.done),
        shards=sum(len(entry.shards) for entry in manifest.done),
        rejects=rejects,
        inputs=inputs,
        skipped=inputs - todo,
        seconds=time.monotonic() - begin,
    )
