"""``faces``: whether a picture shows as many faces as were asked for."""

from collections.abc import Sequence
from typing import Any

from emu35.config.reward_local import FacesRewardConfig
from emu35.rewards.face_detector import FaceDetector
from emu35.rewards.sample import Cost, Range, Record, Sample, Score, Unscored


class FacesReward:
    """1 - |found - asked| / max(found, asked), averaged over the answer's pictures, in [0, 1]; 1
    where none was asked for and none is found. The record says how many under ``faces``."""

    range = Range(low=0.0, high=1.0)
    cost = Cost.cpu

    def __init__(self, config: FacesRewardConfig) -> None:
        """
        Raises:
            ConfigError: opencv is not installed, or the detector cannot be opened.
        """
        self._detector = FaceDetector(config)

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        return [self._score(sample) for sample in samples]

    def problems(self, record: Record) -> list[str]:
        faces: Any = record.get("faces")
        if faces is None:
            return ["reward kind 'faces' needs the number of faces to be shown under faces; add it"]
        if isinstance(faces, bool) or not isinstance(faces, int) or faces < 0:
            return [f"its faces={faces!r} must be a whole number, 0 or more"]
        return []

    def _score(self, sample: Sample) -> Score:
        if not sample.pictures:
            return Unscored("the answer has no picture to find faces in")
        asked: int = sample.record["faces"]
        counts = [len(self._detector.faces(picture)) for picture in sample.pictures]
        return sum(_agreement(found, asked) for found in counts) / len(counts)


def _agreement(found: int, asked: int) -> float:
    most = max(found, asked)
    return 1 - abs(found - asked) / most if most else 1.0
