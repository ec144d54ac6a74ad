"""Short clips of scenes: frames with narration between them, as interleaved documents.

A stand-in for the paper's video-interleaved data (section 3.1.1): one object, and from frame to
frame it takes another colour or goes to another place, which the text says just before the frame
shows it.
"""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from emu35.data.scenes.captions import EN_PLACE
from emu35.data.scenes.describe import (
    Colour,
    Place,
    Scene,
    SceneObject,
    Split,
    sample_scene,
    split_of,
)
from emu35.data.scenes.render import render
from emu35.files import write_atomically

FRAMES = 3


def clip(rng: random.Random, *, split: Split) -> list[tuple[str, Scene]]:
    """Narration and scene of each frame; every scene is of ``split``."""
    frames: list[tuple[str, Scene]] = []
    while len(frames) < FRAMES:
        scene = sample_scene(rng, split=split, count_weights=(1.0,))
        frames = [(opening(scene.objects[0]), scene)]
        while len(frames) < FRAMES and (after := change(frames[-1][1], rng=rng, split=split)):
            frames.append(after)
    return frames


def opening(item: SceneObject) -> str:
    """How a clip or a story begins."""
    return f"There is a {item.size} {item.colour} {item.shape} {EN_PLACE[item.place]}."


def change(scene: Scene, *, rng: random.Random, split: Split) -> tuple[str, Scene] | None:
    """What happens to the only object of ``scene``, and the scene afterwards, of ``split``: another
    colour as often as another place. None where nothing leads to a scene of that split."""
    (item,) = scene.objects
    recoloured = [(f"It turns {to}.", replace(item, colour=to)) for to in Colour]
    moved = [(f"It is now {EN_PLACE[to]}.", replace(item, place=to)) for to in Place]
    for choices in rng.sample([recoloured, moved], 2):
        possible = [
            (text, after)
            for text, changed in choices
            for after in [Scene(objects=(changed,), background=scene.background)]
            if changed != item and split_of(after) is split
        ]
        if possible:
            return rng.choice(possible)
    return None


def write_clips(
    folder: Path,
    *,
    count: int,
    seed: int,
    resolution: int,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write ``count`` training clips to ``folder/clips.jsonl``, interleaved JSON lines, with their
    frames beside it; returns the file. The file is the last thing written."""
    rng = random.Random(f"{seed}-clips")
    lines: list[str] = []
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        parts: list[dict[str, Any]] = []
        for index, (text, scene) in enumerate(clip(rng, split=Split.train)):
            name = f"frames/{number:06d}-{index}.png"
            render(scene, resolution=resolution).save(folder / name)
            parts += [{"text": text}, {"image": name}]
        lines.append(json.dumps({"id": f"clip-{number:06d}", "parts": parts}) + "\n")
        if progress is not None:
            progress(number + 1)
    path = folder / "clips.jsonl"
    write_atomically(path, content="".join(lines).encode())
    return path
