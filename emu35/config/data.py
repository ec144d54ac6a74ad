"""What a language model reads: token shards. The base of every data section is here too."""

from collections.abc import Iterator, Mapping
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


class Damaged(StrEnum):
    """A shard that is cut short, altered, or without its own index: ``refuse`` to start, or
    ``skip`` it, with its name and reason said at the start. A document whose bytes turn out altered
    when it is read: ``refuse`` ends the run, ``skip`` puts padding in its place and says so."""

    refuse = "refuse"
    skip = "skip"


class Packing(StrEnum):
    """When documents are put together into rows: ``online`` (paper section 3.2, stage 1) while
    training, or ``offline`` once for all, padded to the full row. Stage 2 packs its interleaved
    data offline, fine-tuning everything."""

    online = "online"
    offline = "offline"


class Interpolation(StrEnum):
    """What the ratio of a source is between two points of its schedule: that of the point before
    (``steps``), or on the straight line from one to the other (``linear``)."""

    steps = "steps"
    linear = "linear"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Base of every data section; ``kind`` selects the class."""

    kind: str = "tokens"

    def problems(self) -> Iterator[str]:
        yield from ()


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """Which documents of a source are drawn: those within every bound that is given.

    Tokens are those of the whole document, before it is cut or packed; pictures are counted; the
    visual share is that of the codes of pictures among its tokens.
    """

    min_tokens: int | None = None
    max_tokens: int | None = None
    min_pictures: int | None = None
    max_pictures: int | None = None
    min_visual_share: float | None = None
    max_visual_share: float | None = None


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """A folder of token shards and its share of the mixture, by tokens.

    ``schedule`` gives the ratio from some steps on: ``{0: 0.5, 1000: 0.2}`` is 0.5 for the first
    1000 steps and 0.2 from the 1001st, or on the way from one to the other with
    ``data.schedule=linear``. Before its first point the ratio is ``ratio``, after its last it
    stays. 0 draws nothing of the source meanwhile.
    ``epochs`` and ``max_tokens`` are its end: after so many passes over its documents, or before
    the document that would exceed so many tokens, the others share its ratio. None: no end.
    ``path`` is a local folder or a URL: ``s3://BUCKET/FOLDER``, ``gs://...``, ``https://...`` or
    another that fsspec opens (``pip install "emu35[s3]"``, ``gcs``, ``azure`` or ``http``).
    ``packing`` is that of the section (``data.packing``) unless it is given here. A folder that
    ``emu35 data pack`` wrote is read in its rows, whatever the section says; ``online`` is refused.
    ``area`` is how large its pictures are to be when they are ingested, in the words of
    :func:`emu35.config.area.parse_area`; ``emu35 data ingest --recipe`` reads it, training does
    not.
    """

    path: str
    ratio: float = 1.0
    schedule: dict[int, float] = field(default_factory=dict[int, float])
    epochs: float | None = None
    max_tokens: int | None = None
    filter: FilterConfig | None = None
    packing: Packing | None = None
    area: str | None = None


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """A folder of token shards evaluated whole (up to ``max_documents``), on one modality.

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
class CacheConfig:
    """Local copies of shards whose ``path`` is a URL; local shards are read where they lie.

    All processes of a host share ``folder`` (None: ``shards`` in ``$EMU35_CACHE``, or in
    ``~/.cache/emu35``), which holds at most ``bytes``: the copies used least recently go first.
    """

    folder: str | None = None
    bytes: int = 64 * 2**30

    def problems(self) -> Iterator[str]:
        yield from at_least("data.cache", 1, bytes=self.bytes)
        if self.folder is not None and "://" in self.folder:
            yield f"data.cache.folder={self.folder} is a URL; name a folder on a local disk"


@dataclass(kw_only=True, slots=True)
class TokenDataConfig(DataConfig):
    """Token shards, mixed by ratio and packed into rows of ``sequence_length``.

    ``packing: online`` fits documents of all sources into ``open_bins`` rows as they come;
    ``offline`` packs each source once, before the first step, and mixes whole rows. ``overlong``
    says what becomes of a document that is longer than a row, ``damaged`` of a shard or document
    that is not what was written. ``schedule`` is what ratios do between the points of
    :attr:`SourceConfig.schedule`.
    """

    kind: str = "tokens"
    sequence_length: int = 1024
    sources: dict[str, SourceConfig] = field(default_factory=dict[str, SourceConfig])
    validation: dict[str, ValidationConfig] = field(default_factory=dict[str, ValidationConfig])
    packing: Packing = Packing.online
    overlong: Overlong = Overlong.cut
    schedule: Interpolation = Interpolation.steps
    damaged: Damaged = Damaged.refuse
    cache: CacheConfig = field(default_factory=CacheConfig)
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
        yield from self.cache.problems()
        for name, section in self.validation.items():
            yield from at_least(f"data.validation.{name}", 1, every=section.every)
            if section.max_documents < 1:
                yield (
                    f"data.validation.{name}.max_documents={section.max_documents} leaves nothing "
                    f"to evaluate; use at least 1, or remove it with ~data.validation.{name}"
                )
        yield from _mixture(self)


def ratio_points(*, ratio: float, schedule: Mapping[int, float]) -> dict[int, float]:
    """The ratio of a source by step, ascending; the first is that of step 0."""
    return dict(sorted({0: ratio, **schedule}.items()))


def is_drawn(source: SourceConfig) -> bool:
    """Whether the ratio of a source is ever positive; one that is not need not exist."""
    points = ratio_points(ratio=source.ratio, schedule=source.schedule)
    return any(ratio > 0 for ratio in points.values())


def _mixture(data: TokenDataConfig) -> Iterator[str]:
    for name, source in data.sources.items():
        yield from _source(f"data.sources.{name}", source)
    points = {
        name: ratio_points(ratio=source.ratio, schedule=source.schedule)
        for name, source in data.sources.items()
    }
    if points and not any(is_drawn(source) for source in data.sources.values()):
        yield "data.sources: every ratio is 0; at least one source needs a positive ratio"
        return
    for step in sorted({step for steps in points.values() for step in steps}):
        if not any(ratio_at(steps, step, between=data.schedule) for steps in points.values()):
            yield (
                f"data.sources: every ratio is 0 at step {step}; at least one source needs a "
                "positive ratio there, see data.sources.NAME.schedule"
            )


def ratio_at(points: Mapping[int, float], step: float, *, between: Interpolation) -> float:
    """The ratio at ``step`` of what :func:`ratio_points` gives."""
    steps = list(points)
    last = max((number for number, at in enumerate(steps) if at <= step), default=0)
    ratio = points[steps[last]]
    if between is Interpolation.steps or last + 1 == len(steps):
        return ratio
    start, end = steps[last], steps[last + 1]
    return ratio + (points[end] - ratio) * (step - start) / (end - start)


def _source(key: str, source: SourceConfig) -> Iterator[str]:
    if source.ratio < 0:
        yield f"{key}.ratio={source.ratio} is negative; ratios are shares"
    for step, ratio in source.schedule.items():
        if step < 0:
            yield f"{key}.schedule has the step {step}; steps count from 0, the start of the run"
        if ratio < 0:
            yield f"{key}.schedule has the ratio {ratio} at step {step}; ratios are shares"
    if source.epochs is not None and source.epochs <= 0:
        yield (
            f"{key}.epochs={source.epochs} draws nothing; give a positive number of passes, null "
            "for no end, or ratio=0 to leave the source out"
        )
    if source.max_tokens is not None and source.max_tokens < 1:
        yield f"{key}.max_tokens={source.max_tokens} draws nothing; use at least 1, null for no end"
    if source.filter is not None:
        yield from _filter(f"{key}.filter", source.filter)


def _filter(key: str, bounds: FilterConfig) -> Iterator[str]:
    given = (
        ("tokens", bounds.min_tokens, bounds.max_tokens, None),
        ("pictures", bounds.min_pictures, bounds.max_pictures, None),
        ("visual_share", bounds.min_visual_share, bounds.max_visual_share, 1.0),
    )
    for what, low, high, most in given:
        for name, value in ((f"min_{what}", low), (f"max_{what}", high)):
            if value is not None and not 0 <= value <= (value if most is None else most):
                range_ = "is negative" if most is None else f"lies outside 0..{most:g}"
                yield f"{key}.{name}={value} {range_}"
        if low is not None and high is not None and low > high:
            yield f"{key}.min_{what}={low} exceeds max_{what}={high}, so no document is left"


def _areas(data: TokenDataConfig) -> Iterator[str]:
    for kind, sections in (("sources", data.sources), ("validation", data.validation)):
        for name, section in sections.items():
            if section.area is not None:
                try:
                    parse_area(section.area)
                except ConfigError as error:
                    yield f"data.{kind}.{name}.area: {error}"
