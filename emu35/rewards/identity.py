"""``identity``: whether the people of the question's pictures are those of the answer's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu35.config.reward_local import IdentityRewardConfig
from emu35.errors import ConfigError
from emu35.rewards.face_detector import FaceDetector
from emu35.rewards.matching import best_pairs
from emu35.rewards.optional import optional
from emu35.rewards.sample import Cost, Picture, Range, Record, Sample, Score, Unscored


class IdentityReward:
    """Cosine similarity between embeddings of the question's faces and of the answer's, paired so
    that the sum is largest, in [0, 1].

    The mean runs over the faces of the question's pictures: one that finds no partner counts as 0,
    and so does a cosine below 0. Faces that only the answer has cost nothing. Several pictures in
    the answer: the mean of theirs.
    """

    range = Range(low=0.0, high=1.0)
    cost = Cost.cpu

    def __init__(self, config: IdentityRewardConfig) -> None:
        """
        Raises:
            ConfigError: opencv, onnxruntime or scipy is not installed; or a model cannot be opened
                or takes other inputs.
        """
        optional("scipy.optimize", reward=config.kind)
        self._detector = FaceDetector(config)
        self._embedder = FaceEmbedder(config)

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        return [self._score(sample) for sample in samples]

    def problems(self, record: Record) -> list[str]:
        if not record.get("images"):
            return ["reward kind 'identity' compares with the faces of images; add some"]
        return []

    def _score(self, sample: Sample) -> Score:
        if not sample.pictures:
            return Unscored("the answer has no picture to find faces in")
        asked = [face_D for picture in sample.references for face_D in self._embedded(picture)]
        if not asked:
            return Unscored("no face is found in the question's pictures")
        wanted_ND = np.stack(asked)
        return float(np.mean([self._of(picture, wanted_ND) for picture in sample.pictures]))

    def _of(self, picture: Picture, wanted_ND: NDArray[np.float32]) -> float:
        found = self._embedded(picture)
        if not found:
            return 0.0
        alike_NM = np.clip(wanted_ND @ np.stack(found).T, 0, 1)
        pairs = best_pairs(alike_NM)
        return sum(float(alike_NM[row, column]) for row, column in pairs.items()) / len(wanted_ND)

    def _embedded(self, picture: Picture) -> list[NDArray[np.float32]]:
        """A unit vector fp32 [D] for each of the picture's faces."""
        side = self._embedder.side
        faces = self._detector.faces(picture)
        return [self._embedder(self._detector.cut(picture, face, side=side)) for face in faces]


class FaceEmbedder:
    """Square pictures of faces to unit vectors, through an ONNX model of one input [N, 3, S, S] and
    [N, D] as its first output. Threads share it."""

    def __init__(self, config: IdentityRewardConfig) -> None:
        """
        Raises:
            ConfigError: onnxruntime is not installed, or the file is no such model.
        """
        self._config = config
        path = Path(config.embedder)
        if not path.is_file():
            raise ConfigError(f"reward kind {config.kind!r}: there is no embedder {path}")
        runtime: Any = optional("onnxruntime", reward=config.kind)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session: Any = runtime.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            # onnxruntime's errors have no base of their own.
            raise ConfigError(
                f"reward kind {config.kind!r}: {path} cannot be opened ({error}); give an ONNX file"
            ) from error
        self._input, self.side = self._only_input(path)

    def __call__(self, face: Picture) -> NDArray[np.float32]:
        """fp32 [D], of length 1, of a face: RGB uint8 [S, S, 3]. One at a time, since published
        models may fix the first size to 1."""
        channels = face if self._config.channels == "rgb" else face[:, :, ::-1]
        pixels_3SS = channels.astype(np.float32).transpose(2, 0, 1)
        pixels_3SS = (pixels_3SS - self._config.mean) / self._config.std
        vector_D = self._session.run(None, {self._input: pixels_3SS[None]})[0].reshape(-1)
        return vector_D / max(float(np.linalg.norm(vector_D)), 1e-12)

    def _only_input(self, path: Path) -> tuple[str, int]:
        """Its name and S."""
        inputs = self._session.get_inputs()
        shape = inputs[0].shape if inputs else []
        fits = len(inputs) == 1 and len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3]
        if not fits or not isinstance(shape[2], int):
            found = [item.shape for item in inputs]
            raise ConfigError(
                f"reward kind {self._config.kind!r}: {path} takes inputs of shapes {found}; an "
                "embedder takes one [N, 3, S, S] with S fixed"
            )
        return str(inputs[0].name), shape[2]
