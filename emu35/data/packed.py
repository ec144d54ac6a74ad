"""Packing sources once, into a folder of shards of which each member is a row.

The rows are those that ``data.packing=offline`` makes in memory before the first step of every
run: best fit decreasing over all documents, in a shuffled order. Written out, they need no planning
when a run starts, and a rank reads one contiguous range a row rather than documents from all over a
source.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emu35.config.check import at_least
from emu35.config.data import Overlong
from emu35.data.batch import SourceItems
from emu35.data.index import read_index_in, shard_names, verify_index_in
from emu35.data.ingest.progress import Progress
from emu35.data.opening import Message, open_source
from emu35.data.pack import PackedRows, rows_key
from emu35.data.place import Place, name_of
from emu35.data.row_settings import OPTIONS
from emu35.data.shards import ShardMeta, atomic_file, decode_runs
from emu35.data.source import Source, check_vision
from emu35.data.staging import refuse_filled, whole_folder
from emu35.data.storage import open_folder
from emu35.data.writer import ShardWriter
from emu35.errors import ConfigError, DataError
from emu35.tokens.serialize import TokenSequence

Ints = npt.NDArray[np.int64]

RECORD = ".pack.json"
"""Beside the shards: what they were packed from, and how."""


@dataclass(kw_only=True, slots=True)
class PackOptions:
    """Options of ``emu35 data pack``.

    Attributes:
        inputs: folders of shards, or URLs of such, all made with the same tokenizers.
        out: folder for the packed shards; absent or empty.
        sequence_length: tokens of a row.
        source: name of the shards, and with ``seed`` what the order of the rows depends on.
        overlong: what becomes of documents that are longer than a row.
        shard_bytes: size at which a new shard is begun.
    """

    inputs: Sequence[Place]
    out: Path
    sequence_length: int
    source: str
    seed: int = 1234
    overlong: Overlong = Overlong.cut
    shard_bytes: int = 256 * 2**20

    def validate(self) -> None:
        """Raises: ConfigError naming every problem."""
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems)

    def _problems(self) -> Iterator[str]:
        yield from at_least(
            "pack", 1, sequence_length=self.sequence_length, shard_bytes=self.shard_bytes
        )
        places = [place.resolve() if isinstance(place, Path) else place for place in self.inputs]
        for number, place in enumerate(places):
            if place in places[:number]:
                yield f"{self.inputs[number]} is named twice; its documents would count double"
            if place == self.out.resolve():
                yield f"--out {self.out} is one of the folders to pack; name another"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSummary:
    """What was packed. ``cut`` counts documents that became several pieces, ``dropped`` those left
    out for their length; ``notes`` names the latter, a line a source. ``fill`` is the share of all
    places that hold a token. ``repeated``: an earlier call had done it."""

    rows: int
    sequence_length: int
    fill: float
    documents: int
    pieces: int
    tokens: int
    cut: int
    dropped: int
    shards: int
    notes: list[str] = field(default_factory=list[str])
    repeated: bool = False

    def lines(self) -> list[str]:
        """A few lines to print."""
        lines = [
            f"{self.documents} documents, {self.tokens} tokens in {self.rows} rows of "
            f"{self.sequence_length}, {self.fill:.2%} full, {self.shards} shards"
            + (" (packed before from the same)" if self.repeated else "")
        ]
        if self.cut:
            lines.append(
                f"cut: {self.cut} documents longer than a row, {self.pieces} pieces in all"
            )
        if self.dropped:
            lines.append(f"left out: {self.dropped} documents")
        return lines + self.notes


def pack_sources(options: PackOptions) -> PackSummary:
    """Pack the documents of all inputs together and write the rows.

    The same inputs and options give the same bytes. The folder appears when it is complete; run
    again on what it wrote, this only checks that it is the same and whole.

    Raises:
        ConfigError: for impossible options.
        DataError: if an input cannot be used, lies packed already, or was made with another
            tokenizer; if documents are longer than a row and ``overlong`` refuses them; or if
            ``out`` holds anything else.
    """
    options.validate()
    notes: list[str] = []
    entries = [_open(path, options=options, message=notes.append) for path in options.inputs]
    meta = _common_meta(entries, options=options)
    identity = _identity(entries, options=options)
    earlier = _packed_before(options.out, identity=identity)
    if earlier is not None:
        return earlier
    for path in options.inputs:
        _verify(path, message=notes.append)
    job = _Job(entries, meta=meta, options=options)
    with whole_folder(options.out) as folder:
        summary = job.write(folder, notes=notes)
        with atomic_file(folder / RECORD) as file:
            record = {"identity": identity, "summary": asdict(summary)}
            file.write(json.dumps(record, indent=1).encode())
    return summary


def _open(path: Place, *, options: PackOptions, message: Message) -> SourceItems:
    folder = open_folder(path, message=message)
    meta = read_index_in(folder, name=shard_names(folder)[0]).meta
    if meta.packed is not None:
        raise DataError(
            f"{path} lies packed in rows of {meta.packed} tokens already; name the folders that it "
            "was packed from"
        )
    return open_source(
        name=name_of(path),
        path=path,
        vocabulary=meta.vocabulary(),
        limit=options.sequence_length,
        overlong=options.overlong,
        message=message,
        settings=OPTIONS,
    )


def _verify(path: Place, *, message: Message) -> None:
    """Hash whole shards: what is packed gets a digest of its own, behind which damage that no
    checksum of a document covers, in ids, would never be seen again."""
    folder = open_folder(path, message=message)
    for name in shard_names(folder):
        verify_index_in(folder, name=name)


def _common_meta(entries: Sequence[SourceItems], *, options: PackOptions) -> ShardMeta:
    """Of the packed shards. Raises: DataError if the inputs disagree about a tokenizer."""
    sources = [entry.source for entry in entries]
    shards = [shard for source in sources for shard in source.shards]
    first = shards[0].meta
    for shard in shards:
        meta = shard.meta
        if (meta.kind, meta.vocabulary()) != (first.kind, first.vocabulary()):
            raise DataError(
                f"shards {shards[0].path} and {shard.path} were made with different tokenizers: "
                f"kind={first.kind}, {first.n_text} text ids, codebook_size={first.codebook_size} "
                f"and kind={meta.kind}, {meta.n_text} text ids, codebook_size={meta.codebook_size}"
                "; ingest one of them again with the tokenizer of the other"
            )
    encoded = check_vision(sources)
    dtypes = {shard.meta.vision_dtype for shard in shards}
    return ShardMeta(
        source=options.source,
        kind=first.kind,
        n_text=first.n_text,
        codebook_size=first.codebook_size,
        vision=encoded.digest if encoded is not None else None,
        vision_dtype=dtypes.pop() if len(dtypes) == 1 else None,
        packed=options.sequence_length,
    )


def _identity(entries: Sequence[SourceItems], *, options: PackOptions) -> dict[str, Any]:
    """What the bytes of the shards depend on."""
    return {
        "inputs": [[entry.source.name, entry.source.fingerprint] for entry in entries],
        "source": options.source,
        "sequence_length": options.sequence_length,
        "overlong": options.overlong.value,
        "seed": options.seed,
        "shard_bytes": options.shard_bytes,
    }


def _packed_before(out: Path, *, identity: dict[str, Any]) -> PackSummary | None:
    """What an earlier call made of the same inputs in the same way, if it is there and whole."""
    path = out / RECORD
    if not path.is_file():
        refuse_filled(out)
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        before: dict[str, Any] = record["identity"]
        summary = PackSummary(**record["summary"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a readable record of packing ({error}); name another folder with --out"
        ) from error
    changes = [
        f"{name} were {before.get(name)} and are {value}"
        if name == "inputs"
        else f"{name} was {before.get(name)} and is {value}"
        for name, value in identity.items()
        if before.get(name) != value
    ]
    if changes:
        raise DataError(
            f"{out} was packed otherwise: {'; '.join(changes)}. Name another folder with --out, or "
            "delete this one"
        )
    shards = Source(name=out.name, path=out).shards
    if len(shards) != summary.shards:
        raise DataError(
            f"{out} has {len(shards)} shards of the {summary.shards} that were packed; delete it "
            "and run the same command again"
        )
    return replace(summary, repeated=True)


class _Job:
    """The rows of several sources, and where the pieces of each lie."""

    def __init__(
        self, entries: Sequence[SourceItems], *, meta: ShardMeta, options: PackOptions
    ) -> None:
        self._entries = entries
        self._meta = meta
        self._options = options
        self._lengths: Ints = np.concatenate([entry.items.length for entry in entries])
        self._first_item: Ints = np.cumsum([0, *(len(entry.items) for entry in entries)])
        self._rows = PackedRows(
            lengths=self._lengths,
            capacity=options.sequence_length,
            key=rows_key(seed=options.seed, name=options.source),
        )

    def write(self, folder: Path, *, notes: list[str]) -> PackSummary:
        """Write all rows into shards in ``folder``."""
        rows, total = self._rows, int(self._lengths.sum())
        progress = Progress(label=f"packing {self._meta.source}", total=total, items="rows")
        writer = ShardWriter(folder=folder, meta=self._meta, shard_bytes=self._options.shard_bytes)
        done = 0
        with contextlib.closing(progress), writer:
            progress.begin(size=total)
            for row in range(len(rows)):
                sequence, pieces = self._row(rows.items(row))
                writer.append(sequence, document_id=f"row-{row:08d}", extra={"pieces": pieces})
                done += len(sequence.tokens)
                progress.update(done, items=row + 1)
        return self._summary(shards=len(writer.paths), notes=notes)

    def _row(self, items: Sequence[int]) -> tuple[TokenSequence, list[dict[str, Any]]]:
        """The tokens of a row, and what its JSON tells of its pieces."""
        tokens: list[npt.NDArray[np.uint32]] = []
        modality: list[npt.NDArray[np.uint8]] = []
        pieces: list[dict[str, Any]] = []
        start = 0
        for number in items:
            source = int(np.searchsorted(self._first_item, number, side="right")) - 1
            entry, item = self._entries[source], number - int(self._first_item[source])
            document, first = int(entry.items.document[item]), int(entry.items.start[item])
            length = int(entry.items.length[item])
            words, runs = entry.source.words(document)
            tokens.append(words[first : first + length])
            modality.append(decode_runs(runs)[first : first + length])
            facts = entry.source.record(document)
            # Pictures are those of the row, counted in its tokens.
            of = int(entry.source.length[document])
            facts = {key: facts[key] for key in facts if key not in ("tokens", "images")}
            pieces.append({**facts, "start": start, "tokens": length, "first": first, "of": of})
            start += length
        sequence = TokenSequence(tokens=np.concatenate(tokens), modality=np.concatenate(modality))
        return sequence, pieces

    def _summary(self, *, shards: int, notes: list[str]) -> PackSummary:
        counts = [
            np.bincount(entry.items.document, minlength=len(entry.source))
            for entry in self._entries
        ]
        dropped = [entry.items.dropped for entry in self._entries]
        return PackSummary(
            rows=len(self._rows),
            sequence_length=self._options.sequence_length,
            fill=self._rows.fill,
            documents=sum(int((count > 0).sum()) for count in counts),
            pieces=len(self._lengths),
            tokens=int(self._lengths.sum()),
            cut=sum(int((count > 1).sum()) for count in counts),
            dropped=sum(entry.documents for entry in dropped if entry is not None),
            shards=shards,
            notes=notes,
        )
