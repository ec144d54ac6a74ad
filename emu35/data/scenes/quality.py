"""How well pictures show the scenes that they were asked for, with how sure that is.

What generates the pictures is of no matter here: a prompt names a scene, the picture is read by
:mod:`emu35.data.scenes.verify`, and what was found is compared with what was asked for.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu35.data.scenes.describe import Scene
from emu35.data.scenes.task_score import is_right
from emu35.data.scenes.verify import (
    Accuracy,
    FoundObject,
    SceneScore,
    accuracy,
    read_scene,
    score,
)
from emu35.errors import DataError

RESAMPLES = 2000
"""Of the bootstrap; its own error is then far below the interval's width."""

NORMAL_95 = 1.959963984540054
"""Between minus and plus this lie 95% of a standard normal distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenePrompt:
    """What is asked for, in words and exactly."""

    id: str
    prompt: str
    scene: Scene


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What was found in a picture, and how it compares with its scene."""

    found: Sequence[FoundObject]
    score: SceneScore


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A share in [0, 1] and the interval that covers the true one with 95% probability."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneQuality:
    """Of the pictures of one decoder.

    Attributes:
        prompts: how many there were.
        pictures: how many of them got a picture; the others count as an empty one.
        accuracy: share of right attributes (colour, shape, size and place of every object asked
            for); the interval is bootstrapped over prompts, whose objects depend on one another.
        right: share of prompts whose picture is right, as
            :func:`~emu35.data.scenes.task_score.is_right` has it; the interval is Wilson's.
        parts: the share of each attribute.
    """

    prompts: int
    pictures: int
    accuracy: Share
    right: Share
    parts: Accuracy


def read_scene_prompts(path: Path, *, count: int | None = None) -> list[ScenePrompt]:
    """The first ``count`` prompts (None: all) of a JSON lines file with ``prompt`` and ``scene``
    (:meth:`~emu35.data.scenes.describe.Scene.to_json`), and perhaps ``id``, in every line.

    Raises:
        DataError: the file is missing, holds fewer than ``count``, or a line has no such form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise DataError(
            f"prompts {path} cannot be read ({why}); give a JSON lines file with prompt and scene "
            "in every line, such as the demo's corpus/heldout.jsonl"
        ) from error
    written = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not written:
        raise DataError(f"prompts {path} is empty; it needs a prompt and its scene in every line")
    if count is not None and len(written) < count:
        raise DataError(
            f"prompts {path} holds {len(written)} prompts, but {count} are asked for; ask for "
            "fewer, or write more"
        )
    return [_read_prompt(line, where=f"{path}, line {number}") for number, line in written[:count]]


def _read_prompt(line: str, *, where: str) -> ScenePrompt:
    form = 'a line is {"prompt": "a red circle ...", "scene": {"background": ..., "objects": ...}}'
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is no JSON ({error}); {form}") from error
    try:
        scene = Scene.from_json(record["scene"])
        prompt = str(record["prompt"])
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{where} names no scene to compare a picture with ({type(error).__name__}: {error}); "
            f"{form}"
        ) from error
    if not prompt.strip() or not scene.objects:
        raise DataError(f"{where} has an empty prompt or an empty scene; {form}")
    return ScenePrompt(id=str(record.get("id", where)), prompt=prompt, scene=scene)


def read_pictures(
    pictures: Sequence[NDArray[np.uint8] | None], *, scenes: Sequence[Scene]
) -> list[Reading]:
    """Compare each picture [H, W, 3] with its scene; None, a picture that never came, counts as
    one with nothing in it."""
    readings: list[Reading] = []
    for image_HW3, scene in zip(pictures, scenes, strict=True):
        found = [] if image_HW3 is None else read_scene(image_HW3)
        readings.append(Reading(found=found, score=score(found, scene=scene)))
    return readings


def summarise(scores: Sequence[SceneScore], *, pictures: int) -> SceneQuality:
    """What ``scores``, one a prompt and at least one, come to; ``pictures`` of them had one."""
    right = sum(is_right(item) for item in scores)
    return SceneQuality(
        prompts=len(scores),
        pictures=pictures,
        accuracy=_bootstrapped(scores),
        right=wilson(right, count=len(scores)),
        parts=accuracy(scores),
    )


def wilson(successes: int, *, count: int) -> Share:
    """The share of ``successes`` in ``count`` independent trials with Wilson's 95% interval, which
    holds for few trials and shares near 0 and 1 too (doi 10.1080/01621459.1927.10502953)."""
    value, square = successes / count, NORMAL_95**2 / count
    centre = (value + square / 2) / (1 + square)
    half = math.sqrt(value * (1 - value) * square + square**2 / 4) / (1 + square)
    return Share(value=value, low=max(0.0, centre - half), high=min(1.0, centre + half))


def _bootstrapped(scores: Sequence[SceneScore]) -> Share:
    """The share of right attributes, prompts drawn anew; of fixed draws, so that the same scores
    give the same interval."""
    right_P = np.array(
        [
            item.colour_correct + item.shape_correct + item.size_correct + item.place_correct
            for item in scores
        ],
        dtype=np.float64,
    )
    asked_P = np.array([4 * item.objects for item in scores], dtype=np.float64)
    drawn_RP = np.random.default_rng(0).integers(len(scores), size=(RESAMPLES, len(scores)))
    shares_R = right_P[drawn_RP].sum(1) / asked_P[drawn_RP].sum(1)
    low, high = np.quantile(shares_R, [0.025, 0.975]).tolist()
    return Share(value=float(right_P.sum() / asked_P.sum()), low=low, high=high)
