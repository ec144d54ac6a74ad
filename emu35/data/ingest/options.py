"""What an ingestion is asked to do. Imports nothing heavy, so that the command line can."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path

from emu35.config.area import Area, parse_area
from emu35.config.check import at_least
from emu35.config.tokenizer import TokenizerConfig
from emu35.data.readers.benchmarks import Layout
from emu35.data.readers.clips import ClipFields
from emu35.data.readers.discover import TextUnit
from emu35.data.readers.task_documents import Starts
from emu35.errors import ConfigError

AREA = parse_area("512x512")
"""How large pictures become unless something else is asked for."""


class PairOrder(StrEnum):
    """How a picture and its caption become a document.

    ``both`` writes two sources, ``OUT/caption_first`` and ``OUT/image_first``, and encodes each
    picture once.
    """

    caption_first = "caption_first"
    image_first = "image_first"
    both = "both"


class Dedup(StrEnum):
    """What makes a document a duplicate of an earlier one of the ingestion: nothing, the same
    tokens (``record``), or the same pictures, byte by byte and in order (``picture``)."""

    none = "none"
    record = "record"
    picture = "picture"


class Existing(Enum):
    """What to do with an earlier ingestion in the output folder: go on with it, or start over."""

    # Not a StrEnum, in which ``replace`` would be the method of strings.

    resume = "resume"
    replace = "replace"


@dataclass(kw_only=True, slots=True)
class IngestOptions:
    """Options of ``emu35 data ingest``.

    Attributes:
        inputs: files or folders (see :func:`emu35.data.readers.discover.find_inputs`).
        out: folder for the shards, of this source alone.
        source: name of the source; shards are called ``<source>-000000.tar``.
        tokenizer: text table, codebook size, and the image tokenizer's folder (``vision``).
        layout: the inputs are this benchmark (see :mod:`emu35.data.readers.benchmarks`).
        area: pictures are resized to about so many pixels, aspect kept.
        order: of a picture and its caption; documents of other forms have an order of their own.
        starts: where documents of embodied manipulations begin.
        pictures: folder where relative picture paths in records start; None: at their file's.
        dedup: what is rejected as a duplicate.
        clips: fields by which records of one input are clips of one video, and become one document.
        sequence_length: a picture, or a document of a task, longer than this is rejected, and the
            clips of a video become several documents of about so many tokens (0: no limit).
        workers: processes that read and encode inputs; the shards are the same for any number.
        shard_bytes: size at which a new shard is begun.
        images_per_call: pictures of equal size encoded together.
        threads: threads that open and resize pictures.
        max_rejects: the largest tolerable share of rejected records in an input; duplicates, which
            are rejected because that was asked for, do not count.
    """

    inputs: list[Path]
    out: Path
    source: str
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    area: Area = AREA
    order: PairOrder = PairOrder.caption_first
    text_unit: TextUnit = TextUnit.file
    starts: Starts = Starts.random
    layout: Layout | None = None
    pictures: Path | None = None
    dedup: Dedup = Dedup.none
    clips: ClipFields | None = None
    sequence_length: int = 0
    workers: int = 1
    shard_bytes: int = 256 * 2**20
    images_per_call: int = 16
    threads: int = 2
    max_rejects: float = 0.5
    existing: Existing = Existing.resume

    def validate(self) -> None:
        """Raises: ConfigError naming every problem."""
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems)

    def _problems(self) -> Iterator[str]:
        if not self.inputs:
            yield "inputs is empty; give at least one file or folder"
        yield from self.tokenizer.problems()
        yield from at_least(
            "ingest",
            1,
            shard_bytes=self.shard_bytes,
            images_per_call=self.images_per_call,
            threads=self.threads,
            workers=self.workers,
        )
        if self.clips is not None and not self.clips.group:
            yield "ingest.clips has no field that names the video; give it (--group-by)"
        if self.pictures is not None and not self.pictures.is_dir():
            yield f"ingest.pictures={self.pictures} is no folder; name where picture paths start"
        if not 1 <= self.area.least <= self.area.most:
            yield (
                f"ingest.area={self.area} must hold at least one pixel, and no more at its lower "
                "end than at its upper one"
            )
        yield from at_least("ingest", 0, sequence_length=self.sequence_length)
        if not 0.0 <= self.max_rejects <= 1.0:
            yield f"ingest.max_rejects={self.max_rejects} must lie in [0, 1]"


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestSummary:
    """What an ingestion did, inputs done in earlier runs included; counts are over all sources.

    ``rejects`` maps a reason to its count; ``skipped`` counts inputs that were done already,
    ``new_documents`` and ``new_tokens`` what came of the others.
    """

    documents: int
    tokens: int
    visual_tokens: int
    shards: int
    rejects: dict[str, int]
    inputs: int
    skipped: int
    seconds: float
    new_documents: int = 0
    new_tokens: int = 0

    def lines(self) -> list[str]:
        """A few lines to print."""
        return [
            f"{self.documents} documents, {self.tokens} tokens ({self.visual_tokens} visual), "
            f"{self.shards} shards from {self.inputs} inputs in {self.seconds:.1f} s",
            *self.details(),
        ]

    def details(self) -> list[str]:
        """What was done before, and what was left out."""
        rows: list[str] = []
        if self.skipped:
            rows.append(f"{self.skipped} inputs were done already")
        rows += [f"rejected: {count} x {reason}" for reason, count in sorted(self.rejects.items())]
        return rows
