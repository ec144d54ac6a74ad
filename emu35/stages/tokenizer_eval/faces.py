"""Faces of an original, and the same places of a reconstruction, as vectors.

A face is looked for in the original alone: what a tokenizer made of it is cut out at the same place
and turned in the same way, so that the two differ by the tokenizer and nothing else. The network is
an ONNX file of the user's choice, or dlib's (``pip install 'emu35[faces]'``), whose cosines lie
close together: 0.92 is about where it takes two pictures for the same person's. Cosines of two
networks do not compare.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu35.config.reward_local import IdentityRewardConfig
from emu35.config.tokenizer_eval import FaceEvalConfig
from emu35.errors import ConfigError
from emu35.rewards.face_detector import FaceDetector
from emu35.rewards.identity import FaceEmbedder
from emu35.stages.picture_features import Picture

DLIB, DLIB_MODELS = "dlib", "face_recognition_models"
DLIB_SIDE = 512
"""Pixels that the shorter side is enlarged to; dlib's detector sees faces of 80 or more."""

F = TypeVar("F")
Vector = NDArray[np.floating]


class FaceLikeness(Protocol):
    """Finds faces, and compares what stands at their places."""

    def cosines(self, original: Picture, decoded: Sequence[Picture]) -> list[list[float]]:
        """For each of ``decoded`` the cosines in [-1, 1] of the original's faces, the largest face
        first; 1 where the reconstruction is equal."""
        ...


class FaceCosines(Generic[F]):
    """:class:`FaceLikeness` of a detector and an embedder of the faces that it finds."""

    def __init__(
        self,
        *,
        find: Callable[[Picture], Sequence[F]],
        embed: Callable[[Picture, F], Vector],
    ) -> None:
        self._find, self._embed = find, embed

    def cosines(self, original: Picture, decoded: Sequence[Picture]) -> list[list[float]]:
        faces = list(self._find(original))
        wanted = [_unit(self._embed(original, face)) for face in faces]
        return [
            [
                float(vector_D @ _unit(self._embed(picture, face)))
                for vector_D, face in zip(wanted, faces, strict=True)
            ]
            for picture in decoded
        ]


def onnx_faces(config: FaceEvalConfig) -> FaceLikeness:
    """By ``config.embedder``, as the reward ``identity`` has it.

    Raises:
        ConfigError: opencv or onnxruntime is not installed, or a model cannot be opened.
    """
    assert config.embedder is not None
    rewards = IdentityRewardConfig(
        kind="stage.faces",
        embedder=config.embedder,
        detector=config.detector,
        smallest=config.smallest,
        mean=config.mean,
        std=config.std,
        channels=config.channels,
    )
    detector, embedder = FaceDetector(rewards), FaceEmbedder(rewards)
    return FaceCosines(
        find=detector.faces,
        embed=lambda picture, face: embedder(detector.cut(picture, face, side=embedder.side)),
    )


def dlib_faces(config: FaceEvalConfig) -> FaceLikeness:
    """By dlib's network of 128 numbers, with its detector and its five landmarks.

    Raises:
        ConfigError: a package cannot be loaded, or its models are damaged.
    """
    try:
        dlib: Any = import_module(DLIB)
        models: Any = import_module(DLIB_MODELS)
        landmarks = dlib.shape_predictor(models.pose_predictor_five_point_model_location())
        network = dlib.face_recognition_model_v1(models.face_recognition_model_location())
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"dlib cannot be used ({error}); pip install 'emu35[faces]' again, or give "
            "stage.faces.embedder"
        ) from error
    detector = dlib.get_frontal_face_detector()

    def find(picture: Picture) -> Sequence[Any]:
        shown = _enlarged(picture)
        boxes = sorted(detector(shown, 0), key=lambda box: box.area(), reverse=True)
        smallest = config.smallest * min(shown.shape[:2])
        return [landmarks(shown, box) for box in boxes if min(box.width(), box.height()) > smallest]

    def embed(picture: Picture, face: Any) -> Vector:
        return np.array(network.compute_face_descriptor(_enlarged(picture), face))

    return FaceCosines(find=find, embed=embed)


def _enlarged(picture: Picture) -> Picture:
    height, width = picture.shape[:2]
    factor = DLIB_SIDE / min(height, width)
    if factor <= 1:
        return np.ascontiguousarray(picture)
    size = (round(width * factor), round(height * factor))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def _unit(vector_D: Vector) -> Vector:
    return vector_D / max(float(np.linalg.norm(vector_D)), 1e-12)
