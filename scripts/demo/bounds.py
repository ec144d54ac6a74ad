"""Between what bounds the accuracy on tasks lies: without looking, and with perfect answers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu35.data.scenes.describe import Scene
from emu35.data.scenes.render import render
from emu35.data.scenes.task_score import score_answer
from emu35.vision.codec import ImageCodec, load_codec
from through import through

Prompts = Sequence[Mapping[str, Any]]
Pictures = Sequence[Sequence[NDArray[np.uint8]]]


def chance(prompts: Prompts, *, pictures: Pictures) -> dict[str, float]:
    """Share right by task of answers that ignore what they are asked.

    For pictures: those of a model (``pictures``, by prompt) held against the next prompt of the
    same task. For questions: the best single answer to each kind of question.
    """
    shares: dict[str, float] = {}
    for task, indices in _by_task(prompts).items():
        if "answer" in prompts[indices[0]]["expect"]:
            shares[task] = _constant([prompts[index] for index in indices])
            continue
        following = [*indices[1:], indices[0]]
        right = [
            score_answer(prompts[other]["expect"], text="", pictures=pictures[index]).right
            for index, other in zip(indices, following, strict=True)
        ]
        shares[task] = sum(right) / len(right)
    return {**shares, "mean": sum(shares.values()) / len(shares)}


def ceiling(prompts: Prompts, *, vision: Path, resolution: int) -> dict[str, float]:
    """Share right by task of the true pictures, encoded and decoded by the image tokenizer in
    ``vision``; for words 1."""
    codec = load_codec(vision)
    shares: dict[str, float] = {}
    for task, indices in _by_task(prompts).items():
        right: list[bool] = []
        for expect in (prompts[index]["expect"] for index in indices):
            scenes = [Scene.from_json(scene) for scene in expect.get("scenes", [])]
            shown = [_decoded(codec, scene, resolution=resolution) for scene in scenes]
            text = str(expect.get("answer", ""))
            right.append(score_answer(expect, text=text, pictures=shown).right)
        shares[task] = sum(right) / len(right)
    return {**shares, "mean": sum(shares.values()) / len(shares)}


def _constant(prompts: Prompts) -> float:
    by_kind: dict[str, Counter[str]] = {}
    for prompt in prompts:
        by_kind.setdefault(prompt["kind"], Counter())[prompt["expect"]["answer"]] += 1
    return sum(answers.most_common(1)[0][1] for answers in by_kind.values()) / len(prompts)


def _decoded(codec: ImageCodec, scene: Scene, *, resolution: int) -> NDArray[np.uint8]:
    picture = render(scene, resolution=resolution)
    return np.asarray(through(codec, picture, resolution=resolution)[1])


def _by_task(prompts: Prompts) -> dict[str, list[int]]:
    indices: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        indices.setdefault(prompt["task"], []).append(index)
    return indices
