"""One ingestion from options to shards and a summary."""

import itertools
import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from emu35.data.ingest.documents import FOLDERS, DocumentStage, Outcome
from emu35.data.ingest.manifest import DoneInput, Manifest, lock_folder, open_books
from emu35.data.ingest.options import Dedup, Existing, IngestOptions, IngestSummary
from emu35.data.ingest.pictures import PictureEncoder
from emu35.data.ingest.progress import Progress
from emu35.data.ingest.seen import Seen, open_seen
from emu35.data.ingest.spool import has_spool, read_spool
from emu35.data.ingest.workers import Crew, Errand
from emu35.data.readers.discover import InputFile, find_inputs
from emu35.data.readers.records import Reason, Reject
from emu35.data.shards import ShardMeta, atomic_file
from emu35.data.writer import ShardWriter
from emu35.errors import DataError
from emu35.log.console import Console
from emu35.tokens.serialize import Modality
from emu35.tokens.text import TextTokenizer, build_text_tokenizer

REJECTS = "rejects.jsonl"
_KIND = "rejects"
"""Folder of the books for the rejects of each input."""
_ENCODED = "encoded"
"""Folder of the books for what workers made of inputs whose shards are still to be written."""


def ingest(options: IngestOptions, *, encoder: PictureEncoder | None) -> IngestSummary:
    """Turn inputs into token shards; see the package for what an interruption leaves behind.

    Args:
        encoder: makes codes of pictures; None where the inputs hold no picture.

    Raises:
        ConfigError: for impossible options.
        DataError: if inputs are missing, the output folder cannot be used, an input has too many
            rejects, or nothing at all could be ingested.
        TokenizerError: if the text table is missing.
        LaunchError: if a worker died.
    """
    begin = time.monotonic()
    options.validate()
    inputs = find_inputs(
        options.inputs,
        text_unit=options.text_unit,
        starts=options.starts,
        layout=options.layout,
        pictures=options.pictures,
        fields=options.clips.names if options.clips is not None else (),
    )
    if not inputs:
        raise DataError(
            "the inputs hold nothing but what img2dataset writes about its shards; give the tars, "
            "or the folder they are in"
        )
    _require_encoder(inputs, encoder=encoder)
    tokenizer = build_text_tokenizer(options.tokenizer)
    if encoder is not None and options.existing is Existing.replace:
        encoder.check()
    with lock_folder(options.out):
        manifest = open_books(
            out=options.out,
            folders=list(FOLDERS[options.order]),
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
        with open_seen(manifest) if options.dedup is not Dedup.none else nullcontext() as seen:
            job = _Job(
                options=options, tokenizer=tokenizer, encoder=encoder, manifest=manifest, seen=seen
            )
            job.run(todo, skipped_bytes=sum(s.size for s in inputs if s not in todo))
        failures = job.failures
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


@dataclass(kw_only=True, slots=True)
class _Tally:
    """Counts over one input."""

    documents: int = 0
    tokens: int = 0
    visual_tokens: int = 0
    records: int = 0
    rejects: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def unusable(self) -> int:
        """Records that cannot be used; duplicates could be, and are left out as asked."""
        return sum(self.rejects.values()) - self.rejects.get(Reason.duplicate, 0)


@dataclass(kw_only=True, slots=True)
class _Job:
    """The parts of a running ingestion; ``seen`` is None where duplicates are kept."""

    options: IngestOptions
    tokenizer: TextTokenizer
    encoder: PictureEncoder | None
    manifest: Manifest
    seen: Seen | None
    failures: list[tuple[InputFile, str]] = field(default_factory=list[tuple[InputFile, str]])

    def run(self, inputs: Sequence[InputFile], *, skipped_bytes: int) -> None:
        """Ingest all inputs; those that are not committed are in ``failures``."""
        progress = Progress(
            label=f"ingest {self.options.source}",
            total=skipped_bytes + sum(source.size for source in inputs),
            items="documents",
        )
        progress.skip(skipped_bytes)
        spools = {source.path: self._spool(source) for source in inputs}
        self._drop_spools(keep=set(spools.values()))
        try:
            if self.options.workers > 1:
                self._run_workers(inputs, spools=spools, progress=progress)
            else:
                self._run_here(inputs, spools=spools, progress=progress)
        finally:
            progress.close()

    def _run_here(
        self, inputs: Sequence[InputFile], *, spools: Mapping[Path, Path], progress: Progress
    ) -> None:
        """One input after the other, in this process."""
        stage = DocumentStage(options=self.options, tokenizer=self.tokenizer, encoder=self.encoder)
        for source in inputs:
            progress.begin(size=source.size)
            spool = spools[source.path]
            if has_spool(spool, fingerprint=source.fingerprint):
                # Workers of an earlier run encoded it.
                self._finish(source, outcomes=read_spool(spool), progress=progress)
            else:
                self._finish(source, outcomes=stage.run(source), progress=progress)
            spool.unlink(missing_ok=True)

    def _run_workers(
        self, inputs: Sequence[InputFile], *, spools: Mapping[Path, Path], progress: Progress
    ) -> None:
        """Inputs side by side; their shards are written here, in the order of the inputs."""
        ready = {
            source.path
            for source in inputs
            if has_spool(spools[source.path], fingerprint=source.fingerprint)
        }
        progress.skip(sum(source.size for source in inputs if source.path in ready))
        waiting = deque(inputs)
        errands = [
            Errand(source=source, spool=spools[source.path])
            for source in inputs
            if source.path not in ready
        ]
        with Crew(options=self.options, encoder=self.encoder, errands=errands) as crew:
            for finished in itertools.chain([None], crew.events()):
                if finished is not None:
                    ready.add(finished.source.path)
                done, documents = crew.done
                progress.update_all(done, items=documents)
                while waiting and waiting[0].path in ready:
                    source = waiting.popleft()
                    spool = spools[source.path]
                    self._finish(source, outcomes=read_spool(spool), progress=None)
                    spool.unlink()

    def _spool(self, source: InputFile) -> Path:
        return self.manifest.notes(_ENCODED, path=source.path)

    def _drop_spools(self, *, keep: Set[Path]) -> None:
        """Remove what was encoded for other inputs or options."""
        for path in (self.manifest.books / _ENCODED).glob("*.jsonl"):
            if path not in keep:
                path.unlink()

    def _finish(
        self, source: InputFile, *, outcomes: Iterable[Outcome], progress: Progress | None
    ) -> None:
        """Write the shards of an input and commit them, unless too much of it was rejected."""
        if self.seen is not None:
            self.seen.begin(source.path)
        entry, tally = self._write_input(source, outcomes=outcomes, progress=progress)
        if tally.unusable > self.options.max_rejects * tally.records:
            message = (
                f"input {source.path} had {tally.unusable} of {tally.records} records rejected, "
                f"above max_rejects={self.options.max_rejects}, and was left out"
            )
            self.failures.append((source, message))
            self.manifest.clear_staging()
            if self.seen is not None:
                self.seen.rollback()
            return
        if self.seen is not None:
            self.seen.commit()
        self.manifest.commit(entry)

    def _write_input(
        self, source: InputFile, *, outcomes: Iterable[Outcome], progress: Progress | None
    ) -> tuple[DoneInput, _Tally]:
        """Write the shards of one input into the staging folder."""
        tally = _Tally()
        with ExitStack() as stack:
            notes = self.manifest.notes(_KIND, path=source.path)
            file = stack.enter_context(atomic_file(notes))
            writers = [
                stack.enter_context(self._writer(folder)) for folder in self.manifest.folders
            ]
            for outcome in outcomes:
                tally.records += outcome.records
                duplicates = list(self._append(outcome, writers=writers, tally=tally))
                for reject in [*outcome.rejects, *duplicates]:
                    reason = str(reject.reason)
                    tally.rejects[reason] = tally.rejects.get(reason, 0) + 1
                    line = {
                        "input": str(source.path),
                        "id": reject.id,
                        "reason": reason,
                        "detail": reject.detail,
                    }
                    file.write(json.dumps(line).encode() + b"\n")
                if progress is not None:
                    progress.update(outcome.offset, items=tally.documents)
        entry = DoneInput(
            path=str(source.path),
            fingerprint=source.fingerprint,
            shards=[
                path.relative_to(self.manifest.staging).as_posix()
                for writer in writers
                for path in writer.paths
            ],
            documents=tally.documents,
            tokens=tally.tokens,
            visual_tokens=tally.visual_tokens,
            rejects=tally.rejects,
        )
        return entry, tally

    def _append(
        self, outcome: Outcome, *, writers: Sequence[ShardWriter], tally: _Tally
    ) -> Iterator[Reject]:
        """Add the documents of an outcome to the shards, and yield those that are duplicates."""
        for ready in outcome.documents:
            if self.seen is not None and ready.hash:
                first = self.seen.add(ready.hash, id=ready.id)
                if first is not None:
                    detail = f"the same {self.options.dedup.value} as {first.id} of {first.input}"
                    yield Reject(id=ready.id, reason=Reason.duplicate, detail=detail)
                    continue
            for writer, sequence in zip(writers, ready.sequences, strict=True):
                writer.append(sequence, document_id=ready.id)
                tally.documents += 1
                tally.tokens += len(sequence)
                tally.visual_tokens += int(np.count_nonzero(sequence.modality == Modality.VISUAL))

    def _writer(self, folder: str) -> ShardWriter:
        config = self.options.tokenizer
        meta = ShardMeta(
            source=self.options.source,
            kind=config.kind.value,
            n_text=self.tokenizer.vocabulary.n_text,
            codebook_size=config.codebook_size,
            vision=self.encoder.digest if self.encoder is not None else None,
            vision_dtype=self.encoder.dtype if self.encoder is not None else None,
        )
        return ShardWriter(
            folder=self.manifest.staging / folder,
            meta=meta,
            shard_bytes=self.options.shard_bytes,
            taken=self.manifest.shard_numbers(folder),
        )


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
        "dedup": options.dedup.value,
        "clips": ", ".join(options.clips.names) if options.clips is not None else None,
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
