"""One tokenization: pictures in, tars of codes and a report of their codebook out."""

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from emu35.data.codes.grid import EXTENSION, Grid, decode_grid, encode_grid
from emu35.data.codes.options import TokenizeOptions
from emu35.data.codes.shards import CODES_SHARDS, META_MEMBER, CodesMeta
from emu35.data.codes.usage import Usage, usage_of, write_report
from emu35.data.ingest.job import JobOptions, run_job
from emu35.data.ingest.manifest import Manifest
from emu35.data.ingest.options import Dedup, Existing, IngestSummary
from emu35.data.ingest.pictures import EncodedRecord, PictureEncoder, PictureStage
from emu35.data.ingest.product import Counts, Outcome
from emu35.data.readers.discover import InputFile
from emu35.data.readers.picture_inputs import find_picture_inputs
from emu35.data.readers.records import RawCodes, RawRecord, RawText, Reason, Reject
from emu35.data.readers.webdataset import TOKENIZED
from emu35.data.tar_writer import TarWriter, check_source_name
from emu35.log.console import human_count

_USAGE = "usage"
"""Folder of the books for the code counts of each input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodesRecord:
    """A picture as codes, and the fields that go with it."""

    id: str
    codes_HW: Grid
    fields: dict[str, Any]
    hash: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeSummary:
    """What a tokenization did, inputs done in earlier runs included."""

    counts: IngestSummary
    usage: Usage

    def lines(self) -> list[str]:
        """A few lines to print."""
        found = self.counts
        rows = [
            f"{found.documents} pictures, {found.tokens} codes, {found.shards} tars from "
            f"{found.inputs} inputs in {found.seconds:.1f} s"
        ]
        if found.new_documents:
            seconds = max(found.seconds, 1e-9)
            rows[0] += (
                f" ({human_count(found.new_documents / seconds)} pictures/s, "
                f"{human_count(found.new_tokens / seconds)} codes/s)"
            )
        return [*rows, *found.details(), *self.usage.lines()]


def tokenize(
    options: TokenizeOptions, *, encoder: PictureEncoder, meta: CodesMeta
) -> TokenizeSummary:
    """Encode pictures and write their codes; see :mod:`emu35.data.codes` for what is left.

    Args:
        meta: what the codes of ``encoder`` are.

    Raises:
        ConfigError: for impossible options.
        DataError: if inputs are missing, the output folder cannot be used, an input has too many
            rejects, or no picture at all could be encoded.
        LaunchError: if a worker died.
    """
    options.validate()
    check_source_name(options.source)
    inputs = find_picture_inputs(options.inputs)
    if options.existing is Existing.replace:
        encoder.check()
    usage = Usage.none(meta.codebook_size)

    def report(manifest: Manifest) -> None:
        nonlocal usage
        notes = [
            _usage_note(manifest, path=Path(entry.path), fingerprint=entry.fingerprint)
            for entry in manifest.done
        ]
        usage = usage_of(notes, codebook_size=meta.codebook_size)
        write_report(usage, folder=options.out)

    counts = run_job(
        CodesShards(options=options, encoder=encoder, meta=meta),
        inputs=inputs,
        options=JobOptions(
            out=options.out,
            folders=["."],
            identity=_identity(options, meta=meta),
            label=f"tokenize {options.source}",
            workers=options.workers,
            max_rejects=options.max_rejects,
            dedup=Dedup.none,
            existing=options.existing,
            kind=CODES_SHARDS,
        ),
        finish=report,
    )
    return TokenizeSummary(counts=counts, usage=usage)


def _identity(options: TokenizeOptions, *, meta: CodesMeta) -> dict[str, Any]:
    """The options that decide what a picture becomes; a rerun must repeat them."""
    area = options.area
    return {
        "source": options.source,
        "product": "codes",
        "vision": meta.tokenizer,
        "vision_dtype": meta.dtype,
        "codebook_size": meta.codebook_size,
        "area": area.most if area.least == area.most else f"{area.least}..{area.most}",
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class CodesShards:
    """A :class:`~emu35.data.ingest.product.Product`: a grid of codes for every picture."""

    options: TokenizeOptions
    encoder: PictureEncoder
    meta: CodesMeta
    noun: str = "picture"
    unit: str = "codes"

    def join(self, *, worker: int, workers: int) -> None:
        """Let the encoder take its share."""
        self.encoder.join(worker=worker, workers=workers)

    def outcomes(self, source: InputFile) -> Iterator[Outcome[CodesRecord]]:
        """An outcome for every record."""
        stage = PictureStage(
            encoder=self.encoder,
            images_per_call=self.options.images_per_call,
            threads=self.options.threads,
            sequence_length=0,
            codebook_size=self.meta.codebook_size,
        )
        for found in stage.run(map(_refuse_codes, source.read())):
            if isinstance(found, Reject):
                yield Outcome(offset=found.offset, records=1, rejects=[found])
            else:
                item = self._record(found)
                yield Outcome(offset=found.record.offset, records=1, documents=[item])

    def _record(self, found: EncodedRecord) -> CodesRecord:
        record = found.record
        (picture,) = record.pictures()
        codes_HW = np.ascontiguousarray(found.codes[picture].codes_HW, dtype="<u4")
        width, height = found.sizes[picture]
        fields = dict(record.fields)
        for part in record.parts:
            if isinstance(part, RawText):
                fields["caption"] = part.text
        fields[TOKENIZED] = {
            "id": record.id,
            "width": width,
            "height": height,
            "rows": codes_HW.shape[0],
            "columns": codes_HW.shape[1],
            "tokenizer": self.meta.tokenizer,
            "dtype": self.meta.dtype,
            "codebook_size": self.meta.codebook_size,
            "factor": self.meta.factor,
        }
        return CodesRecord(id=record.id, codes_HW=codes_HW, fields=fields)

    def units(self, item: CodesRecord) -> int:
        """Codes of a picture."""
        return item.codes_HW.size

    def pack(self, item: CodesRecord) -> bytes:
        """A line of JSON, then the grid as it will be in the tar."""
        head = json.dumps({"id": item.id, "fields": item.fields}).encode()
        return head + b"\n" + encode_grid(item.codes_HW)

    def unpack(self, data: bytes) -> CodesRecord:
        """Inverse of :meth:`pack`."""
        end = data.index(b"\n")
        head: dict[str, Any] = json.loads(data[:end])
        codes_HW = decode_grid(data[end + 1 :])
        return CodesRecord(id=head["id"], codes_HW=codes_HW, fields=head["fields"])

    @contextmanager
    def open(self, manifest: Manifest, *, source: InputFile) -> Generator["_Sink", None, None]:
        """Tars in the staging folder, and the counts of their codes in the books."""
        writer = TarWriter(
            folder=manifest.staging,
            stem=manifest.stem,
            opening=(META_MEMBER, self.meta.to_json().encode()),
            shard_bytes=self.options.shard_bytes,
            taken=manifest.shard_numbers("."),
        )
        usage = Usage.none(self.meta.codebook_size)
        with writer:
            yield _Sink(writer=writer, usage=usage)
        usage.write_note(_usage_note(manifest, path=source.path, fingerprint=source.fingerprint))


def _usage_note(manifest: Manifest, *, path: Path, fingerprint: str) -> Path:
    """Of one content of an input: another may fail, and what was counted before still holds."""
    return manifest.notes(_USAGE, path=path / fingerprint)


def _refuse_codes(record: RawRecord | Reject) -> RawRecord | Reject:
    """``record``, or the reject of one whose picture was encoded before."""
    if isinstance(record, Reject) or not any(isinstance(p, RawCodes) for p in record.parts):
        return record
    return Reject(id=record.id, reason=Reason.are_codes, offset=record.offset)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sink:
    """A writer, and what is known of what went through it."""

    writer: TarWriter
    usage: Usage = field(repr=False)

    @property
    def paths(self) -> list[Path]:
        return self.writer.paths

    def add(self, item: CodesRecord) -> Counts:
        text = json.dumps(item.fields, ensure_ascii=True)
        self.writer.append({EXTENSION: encode_grid(item.codes_HW), "json": text.encode()})
        self.usage.add(item.codes_HW)
        codes = item.codes_HW.size
        return Counts(documents=1, tokens=codes, visual_tokens=codes)
