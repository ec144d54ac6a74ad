"""Inputs into shards, whatever is made of them: read, packed by workers or here, committed."""

import itertools
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from emu35.data.ingest.manifest import DoneInput, Manifest, lock_folder, open_books
from emu35.data.ingest.options import Dedup, Existing, IngestSummary
from emu35.data.ingest.product import Item, Outcome, Product, Sink
from emu35.data.ingest.progress import Progress
from emu35.data.ingest.seen import Seen, open_seen
from emu35.data.ingest.shard_kind import TOKEN_SHARDS, ShardKind
from emu35.data.ingest.spool import has_spool, read_spool
from emu35.data.ingest.workers import Crew, Errand
from emu35.data.readers.discover import InputFile
from emu35.data.readers.records import Reason, Reject
from emu35.data.shards import atomic_file
from emu35.errors import DataError
from emu35.log.console import Console

REJECTS = "rejects.jsonl"
_KIND = "rejects"
"""Folder of the books for the rejects of each input."""
_ENCODED = "encoded"
"""Folder of the books for what workers made of inputs whose shards are still to be written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOptions:
    """How inputs become shards.

    Attributes:
        out: folder for the shards, of this source alone.
        folders: shard folders below it.
        identity: the options that decide what an item becomes; a rerun must repeat them.
        label: what progress calls it.
        kind: what the shards are.
    """

    out: Path
    folders: Sequence[str]
    identity: dict[str, Any]
    label: str
    workers: int
    max_rejects: float
    dedup: Dedup
    existing: Existing
    kind: ShardKind = TOKEN_SHARDS


def run_job(
    product: Product[Item],
    *,
    inputs: Sequence[InputFile],
    options: JobOptions,
    finish: Callable[[Manifest], None] | None = None,
) -> IngestSummary:
    """Make ``product`` of the inputs that are not done yet; ``finish`` sees the books at the end,
    while no other run can write to them, unless the earlier shards were to be replaced and stay.

    Raises:
        DataError: the output folder cannot be used, an input changed or has too many rejects, or
            nothing at all came of all of them.
        LaunchError: a worker died.
    """
    begin = time.monotonic()
    with lock_folder(options.out):
        manifest = open_books(
            out=options.out,
            folders=options.folders,
            identity=options.identity,
            existing=options.existing,
            kind=options.kind,
        )
        # Changed inputs are refused before anything is dropped for being damaged.
        for source in inputs:
            manifest.find(source)
        console = Console(stream=sys.stderr)
        for line in manifest.drop_damaged(inputs):
            console.line(line)
        todo = [source for source in inputs if manifest.find(source) is None]
        with open_seen(manifest) if options.dedup is not Dedup.none else nullcontext() as seen:
            job = _Job(options=options, product=product, manifest=manifest, seen=seen)
            job.run(todo, skipped_bytes=sum(s.size for s in inputs if s not in todo))
        failures = job.failures
        _join_rejects(manifest, failed=[source for source, _ in failures])
        # Where nothing came in the place of earlier shards, their report stays as well.
        if finish is not None and not manifest.retired:
            finish(manifest)
    summary = _summary(manifest, inputs=len(inputs), todo=todo, begin=begin)
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
            f"{len(inputs)} inputs gave no {product.noun} at all; reasons are in {rejects}{kept}"
        )
    return summary


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
class _Job(Generic[Item]):
    """The parts of a running ingestion; ``seen`` is None where duplicates are kept."""

    options: JobOptions
    product: Product[Item]
    manifest: Manifest
    seen: Seen | None
    failures: list[tuple[InputFile, str]] = field(default_factory=list[tuple[InputFile, str]])

    def run(self, inputs: Sequence[InputFile], *, skipped_bytes: int) -> None:
        """Ingest all inputs; those that are not committed are in ``failures``."""
        progress = Progress(
            label=self.options.label,
            total=skipped_bytes + sum(source.size for source in inputs),
            items=f"{self.product.noun}s",
            units=self.product.unit,
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
        for source in inputs:
            progress.begin(size=source.size)
            spool = spools[source.path]
            if has_spool(spool, fingerprint=source.fingerprint):
                # Workers of an earlier run encoded it.
                outcomes = read_spool(spool, unpack=self.product.unpack)
            else:
                outcomes = self.product.outcomes(source)
            self._finish(source, outcomes=outcomes, progress=progress)
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
        workers = self.options.workers
        with Crew(product=self.product, workers=workers, errands=errands) as crew:
            for finished in itertools.chain([None], crew.events()):
                if finished is not None:
                    ready.add(finished.source.path)
                done = crew.done
                progress.update_all(done.offset, items=done.items, units=done.units)
                while waiting and waiting[0].path in ready:
                    source = waiting.popleft()
                    spool = spools[source.path]
                    outcomes = read_spool(spool, unpack=self.product.unpack)
                    self._finish(source, outcomes=outcomes, progress=None)
                    spool.unlink()

    def _spool(self, source: InputFile) -> Path:
        return self.manifest.notes(_ENCODED, path=source.path)

    def _drop_spools(self, *, keep: Set[Path]) -> None:
        """Remove what was encoded for other inputs or options."""
        for path in (self.manifest.books / _ENCODED).glob("*.jsonl"):
            if path not in keep:
                path.unlink()

    def _finish(
        self, source: InputFile, *, outcomes: Iterable[Outcome[Item]], progress: Progress | None
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
        self, source: InputFile, *, outcomes: Iterable[Outcome[Item]], progress: Progress | None
    ) -> tuple[DoneInput, _Tally]:
        """Write the shards of one input into the staging folder."""
        tally, units = _Tally(), 0
        with ExitStack() as stack:
            notes = self.manifest.notes(_KIND, path=source.path)
            file = stack.enter_context(atomic_file(notes))
            sink = stack.enter_context(self.product.open(self.manifest, source=source))
            for outcome in outcomes:
                tally.records += outcome.records
                duplicates = list(self._add(outcome, sink=sink, tally=tally))
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
                    units += sum(map(self.product.units, outcome.documents))
                    progress.update(outcome.offset, items=tally.documents, units=units)
        entry = DoneInput(
            path=str(source.path),
            fingerprint=source.fingerprint,
            shards=[path.relative_to(self.manifest.staging).as_posix() for path in sink.paths],
            documents=tally.documents,
            tokens=tally.tokens,
            visual_tokens=tally.visual_tokens,
            rejects=tally.rejects,
        )
        return entry, tally

    def _add(self, outcome: Outcome[Item], *, sink: Sink[Item], tally: _Tally) -> Iterator[Reject]:
        """Put what came of an outcome into the shards, and yield what of it are duplicates."""
        for item in outcome.documents:
            if self.seen is not None and item.hash:
                first = self.seen.add(item.hash, id=item.id)
                if first is not None:
                    detail = f"the same {self.options.dedup.value} as {first.id} of {first.input}"
                    yield Reject(id=item.id, reason=Reason.duplicate, detail=detail)
                    continue
            counts = sink.add(item)
            tally.documents += counts.documents
            tally.tokens += counts.tokens
            tally.visual_tokens += counts.visual_tokens


def _join_rejects(manifest: Manifest, *, failed: Sequence[InputFile]) -> None:
    """Write ``rejects.jsonl`` anew from the rejects of each input."""
    paths = [Path(entry.path) for entry in manifest.done] + [source.path for source in failed]
    with atomic_file(manifest.out / REJECTS) as file:
        for path in paths:
            found = manifest.notes(_KIND, path=path)
            if found.is_file():
                file.write(found.read_bytes())


def _summary(
    manifest: Manifest, *, inputs: int, todo: Sequence[InputFile], begin: float
) -> IngestSummary:
    names = {str(source.path) for source in todo}
    new = [entry for entry in manifest.done if entry.path in names]
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
        skipped=inputs - len(todo),
        seconds=time.monotonic() - begin,
        new_documents=sum(entry.documents for entry in new),
        new_tokens=sum(entry.tokens for entry in new),
    )
