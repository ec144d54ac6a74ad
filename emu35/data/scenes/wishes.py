"""Captions that leave open how large an object is and where it stands, and what whoever asks would
like best: large, in the middle.

No caption says so and no training picture is chosen for it, so nobody can learn it from pictures; a
reward that compares with the liked scene (:mod:`emu35.rewards.scene`) teaches it.
"""

import random
from typing import Any

from emu35.data.scenes.captions import Detail, caption, sample_language
from emu35.data.scenes.describe import (
    Background,
    Colour,
    Place,
    Scene,
    SceneObject,
    Shape,
    Size,
    Split,
    hashed_share,
)

LIKED_SIZE, LIKED_PLACE = Size.large, Place.centre

HELD_OUT_SHARE = 0.25
"""Of all shapes in their colours."""


def wish_split(shape: Shape, colour: Colour) -> Split:
    """The side that an object is on: a hash of its shape and colour."""
    held_out = hashed_share(f"wish {shape} {colour}") < HELD_OUT_SHARE
    return Split.val if held_out else Split.train


def sample_wishes(*, count: int, seed: int, split: Split) -> list[dict[str, Any]]:
    """``count`` captions of ``split`` to generate from: ``id``, ``prompt``, ``language`` and
    ``scene``, the one that would be liked best. Captions come again where there are fewer."""
    rng = random.Random(f"{seed}-wishes-{split}")
    objects = [
        (shape, colour)
        for shape in Shape
        for colour in Colour
        if wish_split(shape, colour) is split
    ]
    prompts: list[dict[str, Any]] = []
    for number in range(count):
        if number % len(objects) == 0:
            rng.shuffle(objects)
        shape, colour = objects[number % len(objects)]
        liked = SceneObject(shape=shape, colour=colour, size=LIKED_SIZE, place=LIKED_PLACE)
        scene = Scene(objects=(liked,), background=rng.choice(list(Background)))
        language = sample_language(rng)
        prompts.append(
            {
                "id": f"wish-{number:04d}",
                "prompt": caption(scene, rng=rng, language=language, detail=Detail.brief),
                "language": str(language),
                "scene": scene.to_json(),
            }
        )
    return prompts
