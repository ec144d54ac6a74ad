"""What a stage reads: token shards for the language model, pictures for the image tokenizer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from emu35.config.area import parse_area
from emu35.config.check import at_least
from emu35.errors import ConfigError


class Modality(StrEnum):
    """Which label tokens a validation loss counts."""

    all = "all"
    text = "text"
    visual = "visual"


class Overlong(StrEnum):
    """A document longer than a row: ``cut`` it at parts, never inside a picture; ``drop`` it, with
    its source and how many said at the start; or ``refuse`` to start."""

    cut = "cut"
    drop = "drop"
    refuse = "refuse"


class Packing(StrEnum):
    """When documents are put together into rows: ``online`` (paper section 3.2, stage 1) while
    training, or ``offline`` once for all, padded to the full row. Stage 2 packs its interleaved
    data offline, fine-tuning everything. ``emu35 data pack`` does it before the run."""

    online = "online"
    offline = "offline"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Base of every data section; ``kind`` selects the class."""

    kind: str = "tokens"

    def problems(self) -> Iterator[str]:
        yield from ()


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """A folder of token shards and its share of the mixture, by tokens.

    ``packing`` is that of the section (``data.packing``) unless it is given here. A folder that
    ``emu35 data pack`` wrote is read in its rows, whatever the section says; ``online`` is refused.
    ``area`` is how large its pictures are to be when they are ingested, in the words of
    :func:`emu35.config.area.parse_area`; ``emu35 data ingest --recipe`` reads it, training does
    not.
    """

    path: str
    ratio: float = 1.0
    packing: Packing | None = None
    area: str | None = None


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """A folder of token shards evaluated whole (up to ``max_documents``; pieces, where ``emu35 data
    pack`` wrote it), on one modality.

    ``every`` thins it out: 3 evaluates it at the first validation and every third one after it, and
    always at the last step.
    ``area`` as in a source.
    """

    path: str
    modality: Modality = Modality.all
    max_documents: int = 256
    every: int = 1
    area: str | None = None


@dataclass(kw_only=True, slots=True)
class TokenDataConfig(DataConfig):
    """Token shards, mixed by ratio and packed into rows of ``sequence_length``.

    ``packing: online`` fits documents of all sources into ``open_bins`` rows as they come;
    ``offline`` packs each source once, before the first step, and mixes whole rows. ``overlong``
    says what becomes of a document that is longer than a row.
    """

    kind: str = "tokens"
    sequence_length: int = 1024
    sources: dict[str, SourceConfig] = field(default_factory=dict[str, SourceConfig])
    validation: dict[str, ValidationConfig] = field(default_factory=dict[str, ValidationConfig])
    packing: Packing = Packing.online
    overlong: Overlong = Overlong.cut
    open_bins: int = 16
    shuffle_window: int = 4096
    prefetch_steps: int = 2

    def problems(self) -> Iterator[str]:
        yield from at_least(
            "data",
            1,
            sequence_length=self.sequence_length,
            open_bins=self.open_bins,
            shuffle_window=self.shuffle_window,
        )
        yield from at_least("data", 0, prefetch_steps=self.prefetch_steps)
        yield from _areas(self)
        for name, section in self.validation.items():
            yield from at_least(f"data.validation.{name}", 1, every=section.every)
            if section.max_documents < 1:
                yield (
                    f"data.validation.{name}.max_documents={section.max_documents} leaves nothing "
                    f"to evaluate; use at least 1, or remove it with ~data.validation.{name}"
                )
        for name, source in self.sources.items():
            if source.ratio < 0:
                yield f"data.sources.{name}.ratio={source.ratio} is negative; ratios are shares"
        if self.sources and not any(source.ratio > 0 for source in self.sources.values()):
            yield "data.sources: every ratio is 0; at least one source needs a positive ratio"


def _areas(data: TokenDataConfig) -> Iterator[str]:
    for kind, sections in (("sources", data.sources), ("validation", data.validation)):
        for name, section in sections.items():
            if section.area is not None:
                try:
                    parse_area(section.area)
                except ConfigError as error:
                    yield f"data.{kind}.{name}.area: {error}"


@dataclass(kw_only=True, slots=True)
class ImageDataConfig(DataConfig):
    """Pictures for training the image tokenizer: webdataset tars or folders of image files.

    With ``crop`` > 0, training sees random squares of that side, cut from the pictures after
    they were resized to ``resolution``; validation always sees whole pictures.
    """

    kind: str = "images"
    paths: list[str] = field(default_factory=list[str])
    validation_paths: list[str] = field(default_factory=list[str])
    resolution: int = 256
    crop: int = 0
    validation_images: int = 64

    def problems(self) -> Iterator[str]:
        yield from at_least("data", 1, resolution=self.resolution)
        yield from at_least("data", 0, crop=self.crop)
        if self.crop > self.resolution:
            yield (
                f"data.crop={self.crop} exceeds data.resolution={self.resolution}; "
                "crops are cut from resized pictures (0: none)"
            )
