"""What an answer to a scene task is worth, read from its pixels and words alone.

A picture is *right* when it shows as many objects as it should and each has the right colour and
place. Shape and size are reported beside it and not required: the demo's image tokenizer loses
every third shape even in an original.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu35.data.scenes.describe import Scene
from emu35.data.scenes.verify import SceneScore, read_scene, score


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerScore:
    """``right``: the whole answer is. ``pictures``: the scores of its pictures, one for each that
    was asked for (a missing one counts as empty); none where words were asked for."""

    right: bool
    pictures: tuple[SceneScore, ...] = ()


def score_answer(
    expect: Mapping[str, Any], *, text: str, pictures: Sequence[NDArray[np.uint8]]
) -> AnswerScore:
    """Compare an answer, its ``text`` and its ``pictures`` [H, W, 3], with what a prompt of
    :func:`emu35.data.scenes.tasks.write_task_prompts` expects."""
    if "answer" in expect:
        return AnswerScore(right=_plain(text) == _plain(str(expect["answer"])))
    scenes = [Scene.from_json(scene) for scene in expect["scenes"]]
    found = [read_scene(picture) for picture in pictures[: len(scenes)]]
    found += [[] for _ in range(len(scenes) - len(found))]
    scores = tuple(score(seen, scene=scene) for seen, scene in zip(found, scenes, strict=True))
    return AnswerScore(right=all(map(is_right, scores)), pictures=scores)


def is_right(picture: SceneScore) -> bool:
    """As many objects as asked for, each with its colour and in its place."""
    return (
        picture.count_correct
        and picture.colour_correct == picture.objects
        and picture.place_correct == picture.objects
    )


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()
