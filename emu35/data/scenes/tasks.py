"""Scenes as fine-tuning tasks: drawing, editing, two-step stories and questions.

Training records are task JSONL with pictures beside it, the form that ``emu35 data ingest`` takes.
Held-out prompts are the form that ``emu35 generate --prompts-file`` takes, with what a right answer
shows under ``expect``, for :mod:`emu35.data.scenes.task_score`.

A record shows one scene or two; it is of a split when all of its scenes are (see ``split_of``), so
a held-out edit starts from a scene that no training picture shows and ends in another one.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emu35.data.scenes.captions import EN_COUNT, EN_PLACE
from emu35.data.scenes.corpus import sample_caption
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

FEW = (0.6, 0.4)
"""Shares of one and two objects in scenes that are asked about or edited."""

IMAGES = "images"
"""Folder of the pictures, beside the records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneTask:
    """One record before its pictures are written.

    Attributes:
        task: ``t2i``, ``x2i``, ``story`` or ``chat``.
        prompt: what is asked.
        shown: the scene that the question shows, if any.
        texts: the text before each scene of the answer; for ``chat`` the answer itself.
        drawn: the scenes of the answer, in order.
        kind: which sort of its task it is, such as ``colour`` for a question of colours.
    """

    task: str
    prompt: str
    shown: Scene | None = None
    texts: tuple[str, ...] = ()
    drawn: tuple[Scene, ...] = ()
    kind: str = ""

    @property
    def scenes(self) -> tuple[Scene, ...]:
        return (*([self.shown] if self.shown else []), *self.drawn)


def drawing(rng: random.Random, *, split: Split) -> SceneTask:
    """``t2i``: a caption, to be drawn."""
    scene = sample_scene(rng, split=split)
    _, text = sample_caption(scene, rng=rng, split=split)
    return SceneTask(task="t2i", prompt=text, drawn=(scene,))


def edit(rng: random.Random, *, split: Split) -> SceneTask:
    """``x2i``: another colour for one object of a picture, everything else kept."""
    while True:
        before = sample_scene(rng, split=split, count_weights=FEW)
        number = rng.randrange(len(before.objects))
        item = before.objects[number]
        colour = _other_colour(before, rng=rng)
        after = _with(before, number, replace(item, colour=colour))
        if _is_unique(before, item) and split_of(after) is split:
            break
    the = f"the {item.colour} {item.shape}"
    prompt = rng.choice(
        (f"Make {the} {colour}.", f"Paint {the} {colour}.", f"Change {the} to {colour}.")
    )
    return SceneTask(task="x2i", prompt=prompt, shown=before, drawn=(after,), kind="recolour")


def story(rng: random.Random, *, split: Split) -> SceneTask:
    """``story``: an object, then the same one in another colour or at another place."""
    while True:
        first = sample_scene(rng, split=split, count_weights=(1.0,))
        item = first.objects[0]
        if rng.random() < 0.5:
            kind, changed = "recolour", replace(item, colour=_other_colour(first, rng=rng))
            happens = f"turns {changed.colour}"
        else:
            place = rng.choice([place for place in Place if place is not item.place])
            kind, changed = "move", replace(item, place=place)
            happens = f"is {EN_PLACE[place]}"
        second = _with(first, 0, changed)
        if split_of(second) is split:
            break
    what = f"{_a(item)} {EN_PLACE[item.place]}"
    prompt = f"A story of {what}; then it {happens}."
    texts = (f"First there is {what}.", f"Then it {happens}.")
    return SceneTask(task="story", prompt=prompt, texts=texts, drawn=(first, second), kind=kind)


def question(rng: random.Random, *, split: Split) -> SceneTask:
    """``chat``: one thing about a picture, to be answered in a word or two."""
    while True:
        scene = sample_scene(rng, split=split, count_weights=FEW)
        item = rng.choice(scene.objects)
        shapes = [other.shape for other in scene.objects]
        colours = [other.colour for other in scene.objects]
        asked: dict[str, tuple[str, str]] = {}
        if shapes.count(item.shape) == 1:
            asked["colour"] = (f"What colour is the {item.shape}?", str(item.colour))
            asked["place"] = (f"Where is the {item.shape}?", EN_PLACE[item.place])
        if colours.count(item.colour) == 1:
            asked["shape"] = (f"What shape is {item.colour}?", str(item.shape))
        asked["count"] = ("How many shapes are there?", EN_COUNT[len(shapes)])
        kind = rng.choice(("colour", "place", "shape", "count"))
        if kind in asked:
            prompt, answer = asked[kind]
            return SceneTask(task="chat", prompt=prompt, shown=scene, texts=(answer,), kind=kind)


TASKS: Mapping[str, Callable[..., SceneTask]] = {
    "t2i": drawing,
    "x2i": edit,
    "story": story,
    "chat": question,
}
"""Task -> what draws a record of it from a generator, for a split."""


def write_task(
    folder: Path,
    *,
    task: str,
    count: int,
    seed: int,
    resolution: int,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write ``count`` training records of ``task`` to ``folder/TASK.jsonl`` and their pictures
    beside it; returns the file. The file is the last thing written."""
    rng = random.Random(f"{seed}-{task}-{Split.train}")
    lines: list[str] = []
    for number in range(count):
        made = TASKS[task](rng, split=Split.train)
        pictures = _write_pictures(
            made, folder=folder, stem=f"{task}-{number:06d}", side=resolution
        )
        record = {"id": f"{task}-{number:06d}", **_record(made, pictures=pictures)}
        lines.append(json.dumps(record) + "\n")
        if progress is not None:
            progress(number + 1)
    path = folder / f"{task}.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_task_prompts(
    folder: Path, *, count: int, seed: int, resolution: int, size: str
) -> list[dict[str, Any]]:
    """``count`` held-out prompts of every task, with their pictures below ``folder``: what
    ``emu35 generate`` reads, plus ``kind`` and ``expect``. ``size`` is the grid of the answers'
    images, ``HEIGHTxWIDTH`` in codes."""
    prompts: list[dict[str, Any]] = []
    for task, make in TASKS.items():
        rng = random.Random(f"{seed}-{task}-{Split.val}")
        for number in range(count):
            made = make(rng, split=Split.val)
            name = f"{task}-heldout-{number:04d}"
            shown = replace(made, drawn=())
            pictures = _write_pictures(shown, folder=folder, stem=name, side=resolution)
            prompt: dict[str, Any] = {"id": name, "task": task, "prompt": made.prompt}
            if pictures:
                prompt["images"] = pictures
            if made.drawn:
                prompt |= {"size": size, "steps": len(made.drawn)}
            prompts.append({**prompt, "kind": made.kind, "expect": _expected(made)})
    return prompts


def _record(made: SceneTask, *, pictures: list[str]) -> dict[str, Any]:
    """The fields of a task record; ``pictures`` are those of its scenes, in order."""
    record: dict[str, Any] = {"task": made.task, "prompt": made.prompt}
    match made.task:
        case "t2i":
            return {**record, "image": pictures[0]}
        case "x2i":
            return {**record, "references": pictures[:1], "image": pictures[1]}
        case "story":
            steps = zip(made.texts, pictures, strict=True)
            return {**record, "steps": [{"text": text, "image": image} for text, image in steps]}
        case _:
            return {**record, "images": pictures, "answer": made.texts[0]}


def _expected(made: SceneTask) -> dict[str, Any]:
    expected: dict[str, Any] = {"scenes": [scene.to_json() for scene in made.drawn]}
    if made.task == "chat":
        return {"answer": made.texts[0]}
    if made.shown is not None:
        expected["shown"] = made.shown.to_json()
    return expected


def _write_pictures(made: SceneTask, *, folder: Path, stem: str, side: int) -> list[str]:
    """Names of the pictures of all scenes of ``made``, relative to ``folder``."""
    names: list[str] = []
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(made.scenes):
        names.append(f"{IMAGES}/{stem}-{number}.png")
        render(scene, resolution=side).save(folder / names[-1])
    return names


def _other_colour(scene: Scene, *, rng: random.Random) -> Colour:
    taken = {item.colour for item in scene.objects}
    return rng.choice([colour for colour in Colour if colour not in taken])


def _is_unique(scene: Scene, item: SceneObject) -> bool:
    """Whether colour and shape name ``item`` alone."""
    return [(other.colour, other.shape) for other in scene.objects].count(
        (item.colour, item.shape)
    ) == 1


def _with(scene: Scene, number: int, item: SceneObject) -> Scene:
    objects = [*scene.objects[:number], item, *scene.objects[number + 1 :]]
    return Scene(
        objects=tuple(sorted(objects, key=lambda other: list(Place).index(other.place))),
        background=scene.background,
    )


def _a(item: SceneObject) -> str:
    words = f"{item.size} {item.colour} {item.shape}"
    return f"a {words}"
