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

from emu35.data.scenes.captions import EN_COUNT, EN_PLACE, caption, sample_language
from emu35.data.scenes.clips import change, opening
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
from emu35.data.scenes.words import Words, render_word, sample_word, word_caption
from emu35.files import write_atomically

FEW = (0.7, 0.3)
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
        later: questions and answers of later turns.
        kind: which sort of its task it is, such as ``colour`` for a question of colours.
    """

    task: str
    prompt: str
    shown: Scene | None = None
    texts: tuple[str, ...] = ()
    drawn: tuple[Scene, ...] = ()
    later: tuple[tuple[str, str], ...] = ()
    kind: str = ""

    @property
    def scenes(self) -> tuple[Scene, ...]:
        return (*([self.shown] if self.shown else []), *self.drawn)


def drawing(rng: random.Random, *, split: Split) -> SceneTask:
    """``t2i``: a caption that leaves nothing open, to be drawn."""
    scene = sample_scene(rng, split=split)
    language = sample_language(rng)
    text = caption(scene, rng=rng, language=language)
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
    first = sample_scene(rng, split=split, count_weights=(1.0,))
    while (changed := change(first, rng=rng, split=split)) is None:
        first = sample_scene(rng, split=split, count_weights=(1.0,))
    happens, second = changed
    kind = "recolour" if first.objects[0].place is second.objects[0].place else "move"
    return SceneTask(
        task="story",
        prompt=f"{opening(first.objects[0])} {happens}",
        texts=("At first:", "Then:"),
        drawn=(first, second),
        kind=kind,
    )


def question(rng: random.Random, *, split: Split) -> SceneTask:
    """``chat``: one thing about a picture, to be answered in a word or a few."""
    scene = sample_scene(rng, split=split, count_weights=FEW)
    kind, prompt, answer = rng.choice(_questions(scene, rng=rng))
    return SceneTask(task="chat", prompt=prompt, shown=scene, texts=(answer,), kind=kind)


def dialogue(rng: random.Random, *, split: Split) -> SceneTask:
    """``chat``: all that can be asked about a picture, one question a turn."""
    scene = sample_scene(rng, split=split, count_weights=FEW)
    asked = _questions(scene, rng=rng)
    rng.shuffle(asked)
    (_, first, answer), *rest = asked
    return SceneTask(
        task="chat",
        prompt=first,
        shown=scene,
        texts=(answer,),
        later=tuple((prompt, answer) for _, prompt, answer in rest),
    )


def _questions(scene: Scene, *, rng: random.Random) -> list[tuple[str, str, str]]:
    """(kind, question, answer) for one object, where shape or colour alone names it, and for the
    whole picture."""
    item = rng.choice(scene.objects)
    asked = [("count", "How many shapes are there?", EN_COUNT[len(scene.objects)])]
    if [other.shape for other in scene.objects].count(item.shape) == 1:
        asked.append(("colour", f"What colour is the {item.shape}?", str(item.colour)))
        asked.append(("place", f"Where is the {item.shape}?", EN_PLACE[item.place]))
    if [other.colour for other in scene.objects].count(item.colour) == 1:
        asked.append(("shape", f"What shape is {item.colour}?", str(item.shape)))
    return asked


TRAINED: Mapping[str, Callable[..., SceneTask]] = {
    "t2i": drawing,
    "x2i": edit,
    "story": story,
    "chat": dialogue,
}
"""Task -> what makes a training record of it from a generator, for a split."""

ASKED: Mapping[str, Callable[..., SceneTask]] = {**TRAINED, "chat": question}
"""The same for held-out prompts, which ask one thing."""


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
        made = TRAINED[task](rng, split=Split.train)
        pictures = _write_pictures(
            made, folder=folder, stem=f"{task}-{number:06d}", side=resolution
        )
        record = {"id": f"{task}-{number:06d}", **_record(made, pictures=pictures)}
        lines.append(json.dumps(record) + "\n")
        if progress is not None:
            progress(number + 1)
    path = folder / f"{task}.jsonl"
    write_atomically(path, content="".join(lines).encode())
    return path


def write_word_task(
    folder: Path,
    *,
    count: int,
    seed: int,
    resolution: int,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write ``count`` training records that ask for a word (:mod:`emu35.data.scenes.words`) to
    ``folder/words.jsonl`` and their pictures beside it; returns the file, the last thing
    written."""
    rng = random.Random(f"{seed}-word-task")
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for number in range(count):
        word = sample_word(rng, use=Words.pictured)
        language = sample_language(rng)
        name = f"word-{number:06d}"
        image = f"{IMAGES}/{name}.png"
        render_word(word, resolution=resolution).save(folder / image)
        prompt = word_caption(word, rng=rng, language=language)
        record = {"id": name, "task": "t2i", "prompt": prompt, "image": image}
        lines.append(json.dumps(record) + "\n")
        if progress is not None:
            progress(number + 1)
    path = folder / "words.jsonl"
    write_atomically(path, content="".join(lines).encode())
    return path


def write_task_prompts(
    folder: Path,
    *,
    count: int,
    seed: int,
    resolution: int,
    size: str,
    split: Split = Split.val,
) -> list[dict[str, Any]]:
    """``count`` prompts of every task, held out or (to be judged while training) of ``split``, with
    their pictures below ``folder``: what ``emu35 generate`` reads, plus ``kind`` and ``expect``.
    ``size`` is the grid of the answers' images, ``HEIGHTxWIDTH`` in codes."""
    prompts: list[dict[str, Any]] = []
    for task, make in ASKED.items():
        # Training records of the same seed begin otherwise, and ask for other scenes.
        rng = random.Random(f"{seed}-{task}-{split}" + ("" if split is Split.val else "-prompts"))
        for number in range(count):
            made = make(rng, split=split)
            name = f"{task}-{'heldout' if split is Split.val else split}-{number:04d}"
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
            first = {"prompt": made.prompt, "images": pictures, "answer": made.texts[0]}
            rest = [{"prompt": prompt, "answer": answer} for prompt, answer in made.later]
            return {"task": made.task, "turns": [first, *rest]}


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
