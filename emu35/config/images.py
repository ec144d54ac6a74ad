"""Pictures for training the image tokenizer: where they lie, which are used, how they are cut."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from emu35.config.check import at_least
from emu35.config.data import DataConfig

SIZE_SCORERS = ("width", "height", "min_side", "pixels", "aspect")
"""Read from a picture's header, in pixels; ``aspect`` is the longer side over the shorter."""

PROXY_SCORERS = ("sharpness_proxy", "contrast_proxy", "colourfulness_proxy", "overlay_proxy")
"""Classical statistics in the place of learnt judgements of quality, looks and watermarks."""


class Buckets(StrEnum):
    """``square``: every picture is cut to a square. ``aspect``: pictures keep their shape as nearly
    as a fixed list of ratios allows, and a micro-batch holds one shape."""

    square = "square"
    aspect = "aspect"


class MissingScore(StrEnum):
    """A picture without the score that a filter asks for (its metadata lack the field): ``drop``
    it, counted and named with that reason; ``keep`` it; or ``refuse`` to start."""

    drop = "drop"
    keep = "keep"
    refuse = "refuse"


class Activation(StrEnum):
    """What turns the outputs of a classifier into scores."""

    none = "none"
    sigmoid = "sigmoid"
    softmax = "softmax"


class Fit(StrEnum):
    """How a picture becomes a model's square: all of it, ``squashed``, or its ``centre``."""

    squashed = "squashed"
    centre = "centre"


@dataclass(kw_only=True, slots=True)
class PictureFilterConfig:
    """Pictures are used whose score lies within ``min`` and ``max`` (None: no bound).

    ``scorer`` is one of :data:`SIZE_SCORERS` or :data:`PROXY_SCORERS`, or an entry of
    ``data.scorers``. ``missing`` is what becomes of pictures without the score.
    """

    scorer: str = ""
    min: float | None = None
    max: float | None = None
    missing: MissingScore = MissingScore.drop


@dataclass(kw_only=True, slots=True)
class ScorerConfig:
    """A score in the pictures' metadata, and the base of those computed by a model.

    ``field`` names a number in the JSON beside a picture (``NAME.json``, in a tar else
    ``KEY.json``; dots reach into sections). Where it is there, it is the score and nothing is
    decoded; a model, where the kind has one, scores the others.
    """

    kind: str = "metadata"
    field: str | None = None

    def problems(self, name: str) -> Iterator[str]:
        if self.kind == "metadata" and not self.field:
            yield f"data.scorers.{name}.field is empty; name the number in the pictures' JSON"
        elif self.field == "":
            yield f"data.scorers.{name}.field is empty; name a field, or null for none"


@dataclass(kw_only=True, slots=True)
class ClassifierScorerConfig(ScorerConfig):
    """One output of a classifier in a file: watermark detectors, quality models.

    ``path`` is ONNX (``.onnx``) or TorchScript (any other suffix), of one input [N, 3, side, side]:
    pixels / 255, less ``mean``, over ``std``, channels in the order of ``channels``. The score is
    number ``output`` of its first output [N, ...] after ``activation``. ``device`` is for
    TorchScript; ONNX runs on the CPU.
    """

    kind: str = "classifier"
    path: str = ""
    side: int = 224
    fit: Fit = Fit.squashed
    channels: str = "rgb"
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    output: int = 0
    activation: Activation = Activation.none
    device: str = "cpu"

    def problems(self, name: str) -> Iterator[str]:
        yield from ScorerConfig.problems(self, name)
        where = f"data.scorers.{name}"
        if not self.path:
            yield f"{where}.path is empty; give the file of an ONNX or TorchScript classifier"
        yield from at_least(where, 1, side=self.side)
        yield from at_least(where, 0, output=self.output)
        if self.channels not in ("rgb", "bgr"):
            yield f"{where}.channels={self.channels!r} must be rgb or bgr"
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3:
                yield f"{where}.{key} has {len(values)} numbers; give one for each of 3 channels"
        if not all(value > 0 for value in self.std):
            yield f"{where}.std={self.std} must be positive"


@dataclass(kw_only=True, slots=True)
class AestheticsScorerConfig(ScorerConfig):
    """A learnt judgement of looks, 1 to 10: the linear layers of ``head`` (safetensors or .pth, in
    the form of LAION's aesthetic predictor) over the picture features of the CLIP model in the
    folder ``model``. Pictures have a shorter side of ``side`` pixels before the model's own
    preparation."""

    kind: str = "aesthetics_model"
    model: str = ""
    head: str = ""
    side: int = 336
    device: str = "cpu"

    def problems(self, name: str) -> Iterator[str]:
        yield from ScorerConfig.problems(self, name)
        if not self.model:
            yield f"data.scorers.{name}.model is empty; give the folder of a CLIP checkpoint"
        yield from at_least(f"data.scorers.{name}", 1, side=self.side)
        if not self.head:
            yield f"data.scorers.{name}.head is empty; give the file of the linear layers"


SCORER_KINDS: dict[str, type[ScorerConfig]] = {
    "metadata": ScorerConfig,
    "classifier": ClassifierScorerConfig,
    "aesthetics_model": AestheticsScorerConfig,
}
"""``kind`` of an entry of ``data.scorers`` -> its class."""


@dataclass(kw_only=True, slots=True)
class ImageDataConfig(DataConfig):
    """Pictures for training the image tokenizer: webdataset tars or folders of image files.

    ``paths`` may hold patterns (``train-*.tar``). ``buckets`` decides the shapes: with ``aspect``,
    of about ``resolution`` squared pixels, ``bucket_group`` consecutive pictures of one shape (0:
    as many as a micro-batch has; a multiple of that lets a run go on with smaller micro-batches).
    With ``crop`` > 0, training sees random pieces of that side (in ``aspect``: of about that side
    squared), cut from the pictures after they were resized to ``resolution``. ``flip`` is the share
    of samples that are mirrored, which also mirrors writing. Validation sees the middle squares of
    whole pictures, neither cropped, mirrored nor filtered.

    ``filters`` must all be passed; ``scorers`` defines scores by name. Scores are computed once,
    before the first step, and kept in ``score_cache`` (None: in the run folder). Fewer than the
    share ``min_kept`` of the pictures left is an error. ``width_field`` and ``height_field`` name
    numbers in the pictures' JSON that stand for their size, so that headers need not be read.
    ``decode_threads`` decode in the background, on every rank.
    """

    kind: str = "images"
    paths: list[str] = field(default_factory=list[str])
    validation_paths: list[str] = field(default_factory=list[str])
    resolution: int = 256
    crop: int = 0
    flip: float = 0.0
    buckets: Buckets = Buckets.square
    bucket_group: int = 0
    filters: list[PictureFilterConfig] = field(default_factory=list[PictureFilterConfig])
    scorers: dict[str, ScorerConfig] = field(default_factory=dict[str, ScorerConfig])
    min_kept: float = 0.01
    score_cache: str | None = None
    width_field: str | None = None
    height_field: str | None = None
    decode_threads: int = 4
    validation_images: int = 64

    def problems(self) -> Iterator[str]:
        yield from at_least(
            "data", 1, resolution=self.resolution, decode_threads=self.decode_threads
        )
        yield from at_least("data", 0, crop=self.crop, bucket_group=self.bucket_group)
        if self.crop > self.resolution:
            yield (
                f"data.crop={self.crop} exceeds data.resolution={self.resolution}; "
                "crops are cut from resized pictures (0: none)"
            )
        for name, share in (("flip", self.flip), ("min_kept", self.min_kept)):
            if not 0 <= share <= 1:
                yield f"data.{name}={share} must lie in [0, 1]"
        if (self.width_field is None) != (self.height_field is None):
            yield "data.width_field and data.height_field belong together; give both, or neither"
        for name, scorer in self.scorers.items():
            yield from _scorer(name, scorer)
        for number, bounds in enumerate(self.filters):
            yield from _filter(f"data.filters[{number}]", bounds, scorers=self.scorers)


def _scorer(name: str, scorer: ScorerConfig) -> Iterator[str]:
    if name in (*SIZE_SCORERS, *PROXY_SCORERS):
        yield f"data.scorers.{name} has the name of a scorer that is always there; rename it"
    yield from scorer.problems(name)


def _filter(
    key: str, bounds: PictureFilterConfig, *, scorers: dict[str, ScorerConfig]
) -> Iterator[str]:
    known = (*SIZE_SCORERS, *PROXY_SCORERS, *scorers)
    if bounds.scorer not in known:
        yield (
            f"{key}.scorer={bounds.scorer!r} is unknown; use one of {', '.join(known)}, or define "
            "it in data.scorers"
        )
    if bounds.min is None and bounds.max is None:
        yield f"{key} has neither min nor max, so it leaves nothing out; give one, or remove it"
    elif bounds.min is not None and bounds.max is not None and bounds.min > bounds.max:
        yield f"{key}.min={bounds.min} exceeds max={bounds.max}, so no picture is left"
