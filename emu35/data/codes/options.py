"""What a tokenization is asked to do. Imports nothing heavy, so that the command line can."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emu35.config.area import Area
from emu35.config.check import at_least
from emu35.data.ingest.options import AREA, Existing
from emu35.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class TokenizeOptions:
    """Options of ``emu35 data tokenize``.

    Attributes:
        inputs: image tars or folders
            (see :func:`emu35.data.readers.picture_inputs.find_picture_inputs`).
        out: folder for the tars of codes, of this source alone.
        source: name of the source; tars are called ``<source>-000000.tar``.
        vision: folder of the image tokenizer.
        area: pictures are resized to about so many pixels, aspect kept.
        workers: processes that read and encode inputs; the tars are the same for any number.
        shard_bytes: size at which a new tar is begun.
        images_per_call: pictures of equal size encoded together.
        threads: threads that open and resize pictures.
        max_rejects: the largest tolerable share of rejected records in an input.
    """

    inputs: list[Path]
    out: Path
    source: str
    vision: Path
    area: Area = AREA
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
            yield "inputs is empty; give at least one tar or folder"
        yield from at_least(
            "tokenize",
            1,
            shard_bytes=self.shard_bytes,
            images_per_call=self.images_per_call,
            threads=self.threads,
            workers=self.workers,
        )
        if not 1 <= self.area.least <= self.area.most:
            yield (
                f"tokenize.area={self.area} must hold at least one pixel, and no more at its "
                "lower end than at its upper one"
            )
        if not 0.0 <= self.max_rejects <= 1.0:
            yield f"tokenize.max_rejects={self.max_rejects} must lie in [0, 1]"
