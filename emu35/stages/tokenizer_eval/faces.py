"""Faces of an original, and the same places of a reconstruction, as vectors.

A face is looked for in the original alone: what a tokenizer made of it is cut out at the same place
and turned in the same way, so that the two differ by the tokenizer and nothing else.
"""

import numpy as np

from emu35.config.reward_local import IdentityRewardConfig
from emu35.config.tokenizer_eval import FaceEvalConfig
from emu35.rewards.face_detector import Face, FaceDetector
from emu35.rewards.identity import FaceEmbedder
from emu35.stages.picture_features import Picture


class FaceLikeness:
    """Cosines between embeddings of faces, as the reward ``identity`` has them."""

    def __init__(self, config: FaceEvalConfig) -> None:
        """
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
        self._detector = FaceDetector(rewards)
        self._embedder = FaceEmbedder(rewards)

    def faces(self, picture: Picture) -> list[Face]:
        """Those of an original, the largest first."""
        return list(self._detector.faces(picture))

    def cosines(self, original: Picture, decoded: Picture, *, faces: list[Face]) -> list[float]:
        """Of each face, in [-1, 1]; 1 where the reconstruction is equal."""
        found: list[float] = []
        for face in faces:
            a, b = (
                self._embedder(self._detector.cut(picture, face, side=self._embedder.side))
                for picture in (original, decoded)
            )
            found.append(float(np.dot(a, b)))
        return found
