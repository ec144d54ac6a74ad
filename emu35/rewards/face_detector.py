"""Faces in pictures: where they are, and as small upright pictures.

Without a model, opencv's cascade for frontal faces is used, whose file comes with opencv's wheel
(below version 5). It misses faces in profile and takes a few things for faces; YuNet, an ONNX file
of 230 kB from opencv's model zoo (``face_detection_yunet_2023mar.onnx``), finds both and says where
eyes, nose and mouth are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu35.config.reward_local import FacesRewardConfig
from emu35.errors import ConfigError
from emu35.rewards.lend import Lender
from emu35.rewards.optional import optional
from emu35.rewards.sample import Picture

CASCADE = "haarcascade_frontalface_default.xml"

LONGEST = 1280
"""Pixels of the longer side that detectors are shown; a larger picture is made smaller."""

ARCFACE_52 = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ],
    dtype=np.float32,
)
"""Where ArcFace (arXiv 1801.07698, its published code) wants the eyes, the nose and the corners of
the mouth, left to right as seen, in 112 x 112 pixels."""

MARGIN = 0.1
"""Of its size that a box without such points is enlarged by on every side."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Face:
    """A face in pixels of its picture: x, y, width, height, and fp32 [5, 2] of eyes, nose and
    mouth where the detector knows them."""

    box: tuple[float, float, float, float]
    points_52: NDArray[np.float32] | None = None

    @property
    def area(self) -> float:
        return self.box[2] * self.box[3]


class FaceDetector:
    """Finds faces; several threads may ask, each with a detector of its own."""

    def __init__(self, config: FacesRewardConfig) -> None:
        """
        Raises:
            ConfigError: opencv is not installed or has no cascades, or the model's file is missing
                or none.
        """
        self._cv2: Any = optional("cv2", reward=config.kind)
        self._config = config
        find = self._yunet(config.detector) if config.detector else self._cascade()
        # A file that is none shows now, not when the first picture comes.
        with find.lend():
            self._find = find

    def faces(self, picture: Picture) -> Sequence[Face]:
        """The faces of ``picture`` (RGB uint8 [H, W, 3]), the largest first."""
        height, width = picture.shape[:2]
        factor = max(1.0, self._config.side / min(height, width))
        factor = min(factor, LONGEST / max(height, width))
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        shown = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        scale_2 = np.array([width / size[0], height / size[1]], dtype=np.float32)
        with self._find.lend() as find:
            found = find(shown)
        smallest = self._config.smallest * min(height, width)
        faces = [_scaled(face, scale_2=scale_2) for face in found]
        seen = [face for face in faces if min(face.box[2:]) >= smallest]
        return sorted(seen, key=lambda face: face.area, reverse=True)

    def cut(self, picture: Picture, face: Face, *, side: int) -> Picture:
        """The face as a square of ``side`` pixels: turned upright where its points are known."""
        if face.points_52 is not None:
            target_52 = ARCFACE_52 * (side / 112)
            turn, _ = self._cv2.estimateAffinePartial2D(
                face.points_52, target_52, method=self._cv2.LMEDS
            )
            if turn is not None:
                return self._cv2.warpAffine(picture, turn, (side, side))
        x, y, width, height = face.box
        half = max(width, height) * (0.5 + MARGIN)
        centre_x, centre_y = x + width / 2, y + height / 2
        box = (centre_x - half, centre_y - half, centre_x + half, centre_y + half)
        square = Image.fromarray(picture).transform(
            (side, side), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC
        )
        return np.asarray(square)

    def _cascade(self) -> "Lender[Callable[[Picture], list[Face]]]":
        if not hasattr(self._cv2, "CascadeClassifier"):
            raise ConfigError(
                f"reward kind {self._config.kind!r}: opencv {self._cv2.__version__} has no "
                "cascades; install opencv-python-headless below 5, or give detector, a YuNet model"
            )
        path = Path(str(self._cv2.data.haarcascades)) / CASCADE

        def make() -> Callable[[Picture], list[Face]]:
            cascade = self._cv2.CascadeClassifier(str(path))
            if cascade.empty():
                raise ConfigError(
                    f"reward kind {self._config.kind!r}: opencv's {path} is missing; give "
                    "detector, a YuNet model"
                )

            def find(shown: Picture) -> list[Face]:
                grey = self._cv2.cvtColor(shown, self._cv2.COLOR_RGB2GRAY)
                boxes = cascade.detectMultiScale(
                    grey, scaleFactor=1.1, minNeighbors=self._config.neighbours
                )
                return [Face(box=(float(x), float(y), float(w), float(h))) for x, y, w, h in boxes]

            return find

        return Lender(make)

    def _yunet(self, detector: str) -> "Lender[Callable[[Picture], list[Face]]]":
        path = Path(detector)
        if not path.is_file():
            raise ConfigError(f"reward kind {self._config.kind!r}: there is no detector {path}")

        def make() -> Callable[[Picture], list[Face]]:
            try:
                network = self._cv2.FaceDetectorYN.create(
                    str(path), "", (320, 320), score_threshold=self._config.confidence
                )
            except self._cv2.error as error:
                raise ConfigError(
                    f"reward kind {self._config.kind!r}: opencv cannot read {path} ({error}); "
                    "give a YuNet model such as face_detection_yunet_2023mar.onnx"
                ) from error

            def find(shown: Picture) -> list[Face]:
                network.setInputSize((shown.shape[1], shown.shape[0]))
                _, rows = network.detect(np.ascontiguousarray(shown[:, :, ::-1]))
                return [] if rows is None else [_of_yunet(row) for row in rows]

            return find

        return Lender(make)


def _of_yunet(row: NDArray[np.float32]) -> Face:
    """Of x, y, width, height, five points from the person's right eye on, and confidence."""
    x, y, width, height = (float(value) for value in row[:4])
    return Face(box=(x, y, width, height), points_52=row[4:14].reshape(5, 2).copy())


def _scaled(face: Face, *, scale_2: NDArray[np.float32]) -> Face:
    x, y, width, height = face.box
    across, down = float(scale_2[0]), float(scale_2[1])
    points_52 = None if face.points_52 is None else face.points_52 * scale_2
    return Face(box=(x * across, y * down, width * across, height * down), points_52=points_52)
