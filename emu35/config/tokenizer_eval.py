"""Evaluation of image tokenizers: which ones, on which pictures, by which measures."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from emu35.config.check import at_least, fraction
from emu35.config.evaluation import TRAINING, training_problems
from emu35.config.stage import Precision, StageConfig

ORIGINALS = "originals"
"""Column of what is measured of the originals themselves."""

LOWEST, HIGHEST = 0.015, 0.64
"""Bounds of heights of text: lines are drawn at 0.7 of the first and 1.25 of the last, and
:mod:`emu35.data.scenes.lines` draws them from 0.01 to 0.8 of the picture."""

SHORTEST = 0.7
"""Height of the lowest line as a share of the first bound."""

SMALLEST = 32
"""Pixels a side that every measure can work on (LPIPS over AlexNet needs 31)."""


class Fid(StrEnum):
    """Whether rFID is measured, in the space of Inception-v3 as torch-fidelity ports it.

    ``where_installed``: if torch-fidelity is there; otherwise the row says what it needs.
    ``required``: without it, or without its weights, nothing is measured at all.
    ``never``: not even then (the first use fetches weights of 92 MB).
    """

    where_installed = "where_installed"
    required = "required"
    never = "never"


class LpipsBackbone(StrEnum):
    """Whose features LPIPS compares: ``alexnet`` is the metric's usual one, ``vgg16`` that of
    training objectives. The two distances are not comparable."""

    alexnet = "alexnet"
    vgg16 = "vgg16"


@dataclass(kw_only=True, slots=True)
class LpipsConfig:
    """LPIPS (arXiv 1801.03924) from ``weights``, a file of backbone and linear layers
    (scripts/fetch_lpips.py writes one), or with the linear layers in ``heads``. Without weights it
    is not measured."""

    backbone: LpipsBackbone = LpipsBackbone.alexnet
    weights: str | None = None
    heads: str | None = None

    def problems(self) -> Iterator[str]:
        if self.heads is not None and self.weights is None:
            yield "stage.lpips.heads are the linear layers alone; give stage.lpips.weights as well"


@dataclass(kw_only=True, slots=True)
class TextEvalConfig:
    """How much of the text in pictures can still be read (rapidocr).

    ``generated`` pictures of words at several sizes are drawn, and those of ``pictures`` (folders
    and tars) are read besides. Lines of text in ``KEY.txt`` beside ``KEY.png`` say what stands in a
    picture; without it, what is read off the original counts as that. Figures are told apart by the
    height of a line as a share of the picture's, at the bounds ``heights``.

    Pictures are enlarged to ``side`` pixels before they are read, and lines that the recogniser
    trusts less than ``confidence`` are not read at all.
    """

    pictures: list[str] = field(default_factory=list[str])
    generated: int = 24
    heights: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2])
    side: int = 512
    confidence: float = 0.5

    def problems(self) -> Iterator[str]:
        yield from at_least("stage.text", 0, generated=self.generated)
        yield from at_least("stage.text", 32, side=self.side)
        yield from fraction("stage.text", confidence=self.confidence)
        rising = all(low < high for low, high in pairwise(self.heights))
        if not rising or not all(0 < height < 1 for height in self.heights):
            yield (
                f"stage.text.heights={self.heights} must rise between 0 and 1 (shares of the "
                "picture's height), as in [0.05, 0.1, 0.2]"
            )
        elif self._drawn and not LOWEST <= self.heights[0] <= self.heights[-1] <= HIGHEST:
            yield (
                f"stage.text.heights={self.heights} must lie in [{LOWEST}, {HIGHEST}], or no line "
                "can be drawn below the first and above the last; or use stage.text.generated=0"
            )

    @property
    def _drawn(self) -> bool:
        """Whether lines are drawn at heights that depend on the bounds."""
        return bool(self.generated and self.heights)

    def problems_with(self, *, side: int) -> Iterator[str]:
        """What does not fit pictures of ``side`` pixels."""
        pixels = SHORTEST * self.heights[0] * side if self._drawn else 1
        if pixels < 1:
            yield (
                f"stage.text.heights[0]={self.heights[0]} and stage.resolutions={side} leave "
                f"{pixels:.2g} pixels for a line of text; use larger pictures or heights, or "
                "stage.text.generated=0"
            )


@dataclass(kw_only=True, slots=True)
class FaceEvalConfig:
    """How alike a face and its reconstruction are to a face recognition network.

    ``embedder`` is an ONNX model of one input [N, 3, S, S], ArcFace or alike, that wants
    (pixel - ``mean``) / ``std`` with channels in the order ``channels``; without one, dlib's
    network is used where it is installed (extra ``faces``). ``detector`` is a YuNet model (ONNX) in
    the place of opencv's cascade, beside ``embedder`` alone. Faces that span less than ``smallest``
    of the picture's shorter side are left out.
    """

    embedder: str | None = None
    detector: str | None = None
    smallest: float = 0.06
    mean: float = 127.5
    std: float = 127.5
    channels: str = "rgb"

    def problems(self) -> Iterator[str]:
        yield from fraction("stage.faces", smallest=self.smallest)
        if self.detector is not None and self.embedder is None:
            yield "stage.faces.detector finds faces for stage.faces.embedder; give that as well"
        if not self.std > 0:
            yield f"stage.faces.std={self.std} must be positive"
        if self.channels not in ("rgb", "bgr"):
            yield f"stage.faces.channels={self.channels!r} must be rgb or bgr"


@dataclass(kw_only=True, slots=True)
class TokenizerEvalConfig(StageConfig):
    """What image ``tokenizers`` (name -> folder) lose of ``pictures`` (folders, tars, files).

    The first ``count`` pictures (0: all) are resized and cut to squares of every side of
    ``resolutions`` (pixels), ``batch_size`` at a time; ranks share the batches out, so that figures
    do not depend on how many there are. ``shown`` pictures of each sort are put on the page.
    """

    kind: str = "tokenizer_eval"
    steps: int = TRAINING["steps"]
    global_batch_size: int = TRAINING["global_batch_size"]
    micro_batch_size: int = TRAINING["micro_batch_size"]
    validate_every: int = TRAINING["validate_every"]
    tokenizers: dict[str, str] = field(default_factory=dict[str, str])
    pictures: list[str] = field(default_factory=list[str])
    count: int = 0
    resolutions: list[int] = field(default_factory=lambda: [256])
    batch_size: int = 8
    fid: Fid = Fid.where_installed
    lpips: LpipsConfig = field(default_factory=LpipsConfig)
    text: TextEvalConfig = field(default_factory=TextEvalConfig)
    faces: FaceEvalConfig = field(default_factory=FaceEvalConfig)
    shown: int = 6

    def problems(self) -> Iterator[str]:
        # Zero-argument super() fails in slotted dataclasses (the class is rebuilt).
        yield from StageConfig.problems(self)
        instead = "use stage.batch_size"
        remedies = {"global_batch_size": instead, "micro_batch_size": instead}
        yield from training_problems(self, remedies=remedies)
        if self.init_from is not None:
            yield (
                f"stage.init_from={self.init_from}: stage=tokenizer_eval starts from nothing; name "
                "image tokenizers as in stage.tokenizers.NAME=FOLDER"
            )
        if not self.tokenizers:
            yield "stage.tokenizers is empty; name at least one, stage.tokenizers.NAME=FOLDER"
        if ORIGINALS in self.tokenizers:
            yield f"stage.tokenizers.{ORIGINALS} has the name of another column; choose another"
        if self.precision is not Precision.fp32:
            yield f"stage.precision={self.precision}: codes are computed in fp32; leave it out"
        if not self.pictures:
            yield "stage.pictures is empty; name folders or tars, as in stage.pictures=[FOLDER]"
        yield from at_least("stage", 0, count=self.count, shown=self.shown)
        yield from at_least("stage", 1, batch_size=self.batch_size)
        yield from self._resolutions()
        for section in (self.lpips, self.text, self.faces):
            yield from section.problems()

    def _resolutions(self) -> Iterator[str]:
        if not self.resolutions:
            yield "stage.resolutions is empty; name at least one side in pixels, as in [256]"
        if len(set(self.resolutions)) != len(self.resolutions):
            yield f"stage.resolutions={self.resolutions} names one twice; drop it"
        for side in self.resolutions:
            if side < SMALLEST:
                yield f"stage.resolutions={self.resolutions}: use at least {SMALLEST} pixels"
        if self.resolutions:
            yield from self.text.problems_with(side=min(self.resolutions))
