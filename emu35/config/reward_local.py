"""Rewards that are computed here, from pixels and from models on this machine's disk."""

from collections.abc import Iterator
from dataclasses import dataclass

from emu35.config.check import at_least, fraction
from emu35.config.reward import RewardConfig


@dataclass(kw_only=True, slots=True)
class OcrRewardConfig(RewardConfig):
    """How truly the words of the record's ``text`` are rendered: 1 - normalised edit distance
    between them and what optical character recognition reads, in [0, 1].

    Pictures whose shorter side is below ``side`` pixels are enlarged to it before they are read.
    Lines that the recogniser trusts less than ``confidence`` are not read at all. ``detector`` and
    ``recogniser`` are ONNX files in the place of those that come with rapidocr.
    """

    kind: str = "ocr"
    ignore_case: bool = True
    ignore_spaces: bool = True
    side: int = 256
    confidence: float = 0.5
    detector: str | None = None
    recogniser: str | None = None

    def problems(self, name: str) -> Iterator[str]:
        yield from RewardConfig.problems(self, name)
        where = f"stage.rewards.{name}"
        yield from at_least(where, 32, side=self.side)
        yield from fraction(where, confidence=self.confidence)


@dataclass(kw_only=True, slots=True)
class OcrLayoutRewardConfig(OcrRewardConfig):
    """How truly the texts of the record's ``layout`` stand where they should, in [0, 1]: likeness
    of the text times overlap of the boxes. Boxes found are a little larger than the letters, so an
    overlap (intersection over union) of ``good_overlap`` is as good as 1; half is what text
    detection is usually held to, and what words in their place reach here (0.46 to 0.7)."""

    kind: str = "ocr_layout"
    good_overlap: float = 0.5

    def problems(self, name: str) -> Iterator[str]:
        yield from OcrRewardConfig.problems(self, name)
        if not 0 < self.good_overlap <= 1:
            yield f"stage.rewards.{name}.good_overlap={self.good_overlap} must lie in (0, 1]"


@dataclass(kw_only=True, slots=True)
class FacesRewardConfig(RewardConfig):
    """Whether a picture shows as many faces as the record's ``faces`` says, in [0, 1].

    ``detector`` is a YuNet model (ONNX); without one the frontal-face cascade that comes with
    opencv finds faces, which misses faces in profile. Faces that span less than ``smallest`` of the
    picture's shorter side are not seen; pictures are enlarged to ``side`` pixels before.
    ``confidence`` is what YuNet must say, ``neighbours`` how many windows must agree in a cascade.
    """

    kind: str = "faces"
    detector: str | None = None
    confidence: float = 0.7
    neighbours: int = 5
    smallest: float = 0.06
    side: int = 256

    def problems(self, name: str) -> Iterator[str]:
        yield from RewardConfig.problems(self, name)
        where = f"stage.rewards.{name}"
        yield from at_least(where, 32, side=self.side)
        yield from at_least(where, 1, neighbours=self.neighbours)
        yield from fraction(where, confidence=self.confidence, smallest=self.smallest)


@dataclass(kw_only=True, slots=True)
class IdentityRewardConfig(FacesRewardConfig):
    """Whether the faces of the question's pictures are those of the answer's: cosine similarity of
    face embeddings, those below 0 counted as 0.

    ``embedder`` is an ONNX model of one input [N, 3, S, S], ArcFace or alike, that wants
    (pixel - ``mean``) / ``std`` with channels in the order ``channels`` (``rgb`` or ``bgr``).
    """

    kind: str = "identity"
    embedder: str = ""
    mean: float = 127.5
    std: float = 127.5
    channels: str = "rgb"

    def problems(self, name: str) -> Iterator[str]:
        yield from FacesRewardConfig.problems(self, name)
        where = f"stage.rewards.{name}"
        if not self.embedder:
            yield f"{where}.embedder is empty; give the ONNX file of a face embedding model"
        if not self.std > 0:
            yield f"{where}.std={self.std} must be positive"
        if self.channels not in ("rgb", "bgr"):
            yield f"{where}.channels={self.channels!r} must be rgb or bgr"


@dataclass(kw_only=True, slots=True)
class AestheticsRewardConfig(RewardConfig):
    """Pixel statistics as proxies of looks, each in [0, 1], in their weighted mean: ``sharpness``,
    ``exposure``, ``contrast`` and ``colourfulness`` are weights. They know nothing of content."""

    kind: str = "aesthetics"
    sharpness: float = 1.0
    exposure: float = 1.0
    contrast: float = 1.0
    colourfulness: float = 1.0

    def problems(self, name: str) -> Iterator[str]:
        yield from RewardConfig.problems(self, name)
        where = f"stage.rewards.{name}"
        weights = {
            "sharpness": self.sharpness,
            "exposure": self.exposure,
            "contrast": self.contrast,
            "colourfulness": self.colourfulness,
        }
        yield from at_least(where, 0, **weights)
        if not any(weights.values()):
            yield f"{where}: all weights are 0; give {', '.join(weights)} a sum above 0"


@dataclass(kw_only=True, slots=True)
class SimilarityRewardConfig(RewardConfig):
    """Cosine similarity of prompt and pictures in the space of a CLIP or SigLIP model.

    ``model`` is a folder of a transformers checkpoint with its tokenizer and image processor;
    nothing is fetched. ``device`` is where it runs: ``cuda`` on the GPU of the rank that judges.
    """

    kind: str = "similarity"
    model: str = ""
    device: str = "cpu"

    def problems(self, name: str) -> Iterator[str]:
        yield from RewardConfig.problems(self, name)
        if not self.model:
            yield (
                f"stage.rewards.{name}.model is empty; give the folder of a CLIP or SigLIP "
                "checkpoint (config.json, weights, tokenizer, preprocessor_config.json)"
            )


@dataclass(kw_only=True, slots=True)
class AestheticsModelRewardConfig(SimilarityRewardConfig):
    """A learnt judgement of looks, 1 to 10: the linear layers of ``head`` (safetensors or .pth, in
    LAION's aesthetic predictor's form) over the picture features of the CLIP model ``model``."""

    kind: str = "aesthetics_model"
    head: str = ""

    def problems(self, name: str) -> Iterator[str]:
        yield from SimilarityRewardConfig.problems(self, name)
        if not self.head:
            yield f"stage.rewards.{name}.head is empty; give the file of the linear layers"


@dataclass(kw_only=True, slots=True)
class PreservationRewardConfig(RewardConfig):
    """What an edit left as it was outside of the record's ``region`` or ``mask``: SSIM and, given
    both files of LPIPS's AlexNet variant, its distance, in [0, 1].

    ``lpips_network`` are torchvision's weights of AlexNet, ``lpips_heads`` LPIPS's linear ones
    (either safetensors or .pth). ``masks`` is the folder that masks' paths are relative to.
    """

    kind: str = "preservation"
    lpips_network: str | None = None
    lpips_heads: str | None = None
    masks: str = "."

    def problems(self, name: str) -> Iterator[str]:
        yield from RewardConfig.problems(self, name)
        if (self.lpips_network is None) != (self.lpips_heads is None):
            yield (
                f"stage.rewards.{name}: LPIPS needs lpips_network and lpips_heads; give both, "
                "or neither"
            )
