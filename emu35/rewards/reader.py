"""Reading words off pictures: rapidocr on a CPU, with the models that its wheel brings.

Every model is named by its file, so that rapidocr never looks for one on the network (without a
file it downloads what is missing, or what differs from its own list of digests).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu35.config.reward_local import OcrRewardConfig
from emu35.errors import ConfigError
from emu35.rewards.lend import Lender
from emu35.rewards.optional import optional
from emu35.rewards.sample import Picture

DETECTOR = "PP-OCRv6_det_small.onnx"
RECOGNISER = "PP-OCRv6_rec_small.onnx"
"""What rapidocr's wheel has in its folder ``models``."""

SHORTEST, LONGEST = 32, 2000
"""Pixels a side that the detector must and may see."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of text and the upright box around it: x0, y0, x1, y1 as shares of the picture's
    width and height, from its upper left corner."""

    text: str
    box: tuple[float, float, float, float]


class Reader:
    """Reads pictures; several threads may, each with a model of its own (30 MB)."""

    def __init__(self, config: OcrRewardConfig) -> None:
        """
        Raises:
            ConfigError: rapidocr or onnxruntime is missing, or a model's file is.
        """
        self._side = config.side
        optional("onnxruntime", reward=config.kind)
        rapidocr = optional("rapidocr", reward=config.kind)
        settings = _settings(config, models=Path(str(rapidocr.__file__)).parent / "models")
        self._models: Lender[Any] = Lender(lambda: rapidocr.RapidOCR(params=settings))

    def lines(self, picture: Picture) -> Sequence[Line]:
        """The lines of ``picture`` (RGB uint8 [H, W, 3]) from top to bottom, those at one height
        from left to right."""
        image = _sized(picture, side=self._side)
        with self._models.lend() as model:
            # The models learnt from pictures whose channels were in the order blue, green, red.
            read = model(np.ascontiguousarray(image[:, :, ::-1]))
        if read.txts is None:
            return []
        height, width = image.shape[:2]
        return [
            Line(text=text, box=_upright(corners_42, width=width, height=height))
            for text, corners_42 in zip(read.txts, read.boxes, strict=True)
        ]


def _settings(config: OcrRewardConfig, *, models: Path) -> dict[str, Any]:
    detector = Path(config.detector or models / DETECTOR)
    recogniser = Path(config.recogniser or models / RECOGNISER)
    for path in (detector, recogniser):
        if not path.is_file():
            raise ConfigError(
                f"reward kind {config.kind!r}: there is no model {path}; install the rapidocr "
                "that emu35[rewards] asks for, or give detector and recogniser as ONNX files"
            )
    return {
        "Global.log_level": "critical",
        "Global.text_score": config.confidence,
        # It would turn lines that stand on their heads before they are read: nobody asked for them.
        "Global.use_cls": False,
        "Det.model_path": str(detector),
        "Rec.model_path": str(recogniser),
        # Its own sizing fails at pictures that are a few pixels high.
        "Global.use_preprocess_img": False,
        # Its own enlarging to 736 pixels makes a small picture take six times as long, and reads
        # no more.
        "Det.limit_side_len": 32,
        "Det.limit_type": "min",
        # Calls run at once instead (``concurrency``).
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }


def _sized(picture: Picture, *, side: int) -> Picture:
    """``picture`` with ``side`` or more pixels on its shorter side, and at most LONGEST on the
    longer; a mere thread is made as wide as a letter must be."""
    height, width = picture.shape[:2]
    factor = min(max(1.0, side / min(height, width)), LONGEST / max(height, width))
    if factor == 1 and min(height, width) >= SHORTEST:
        return picture
    size = (max(SHORTEST, round(width * factor)), max(SHORTEST, round(height * factor)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def _upright(
    corners_42: NDArray[np.floating], *, width: int, height: int
) -> tuple[float, float, float, float]:
    x0, y0 = corners_42.min(axis=0)
    x1, y1 = corners_42.max(axis=0)
    return float(x0 / width), float(y0 / height), float(x1 / width), float(y1 / height)
