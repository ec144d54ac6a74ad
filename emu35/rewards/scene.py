"""``scene``: how much of a described scene its picture shows, read back from the pixels."""

from collections.abc import Sequence
from typing import Any

from emu35.config.reward import SceneRewardConfig
from emu35.data.scenes.describe import Scene
from emu35.data.scenes.verify import read_scene, score
from emu35.rewards.sample import Cost, Picture, Range, Record, Sample, Score, Unscored

ATTRIBUTES = 4
"""Of an object: colour, shape, size and place."""


class SceneReward:
    """The share in [0, 1] of the attributes of a prompt's objects that are read back right
    (:func:`emu35.data.scenes.verify.score`), over all of its scenes.

    The record says what its pictures are to show: ``scene`` for one picture, or for several the
    ``scenes`` of ``expect``, as prompts of :mod:`emu35.data.scenes.tasks` have it. A picture that
    is missing shows nothing; objects and pictures beyond those asked for count for nothing.
    """

    def __init__(self, config: SceneRewardConfig) -> None:
        self.range = Range(low=0.0, high=1.0)
        self.cost = Cost.cpu

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """The share for each sample; :class:`Unscored` where its record describes no scene."""
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> Score:
        problems = self.problems(sample.record)
        if problems:
            return Unscored("; ".join(problems))
        return _share(_scenes(sample.record), pictures=sample.pictures)

    def problems(self, record: Record) -> list[str]:
        """Why the record describes no scene."""
        try:
            scenes = _scenes(record)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            return [f"its scene is none that reward scene can read ({why}); mend it"]
        if not scenes:
            return [
                "reward scene needs what the picture should show under scene, or for several under "
                "expect.scenes; add it, or use another reward"
            ]
        empty = any(not scene.objects for scene in scenes)
        return ["its scene has no object that reward scene could look for"] if empty else []


def _share(scenes: Sequence[Scene], *, pictures: Sequence[Picture]) -> float:
    right = objects = 0
    for number, scene in enumerate(scenes):
        found = read_scene(pictures[number]) if number < len(pictures) else []
        result = score(found, scene=scene)
        objects += result.objects
        right += result.colour_correct + result.shape_correct
        right += result.size_correct + result.place_correct
    return right / (ATTRIBUTES * objects)


def _scenes(record: Record) -> list[Scene]:
    """What the record's pictures are to show, in order; nothing where it does not say.

    Raises:
        KeyError, ValueError, TypeError, AttributeError: it says something that is no scene.
    """
    if record.get("scene") is not None:
        return [Scene.from_json(record["scene"])]
    expect: Any = record.get("expect") or {}
    return [Scene.from_json(scene) for scene in expect.get("scenes") or ()]
