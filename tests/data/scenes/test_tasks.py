"""Scenes as tasks and clips: sides kept apart, answers that are told right from wrong, records that
the reader takes, the same bytes every time."""

import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from emu35.data.readers.jsonl import read_jsonl
from emu35.data.readers.records import RawImage, RawRecord, RawSpecial, RawText
from emu35.data.scenes.captions import EN_PLACE
from emu35.data.scenes.clips import FRAMES, clip, write_clips
from emu35.data.scenes.describe import Scene, Split, split_of
from emu35.data.scenes.render import render
from emu35.data.scenes.task_score import score_answer
from emu35.data.scenes.tasks import ASKED, TRAINED, SceneTask, write_task, write_task_prompts
from emu35.data.scenes.verify import read_scene, score

SIDE = 96
Picture = NDArray[np.uint8]


def drawn(scene: dict[str, Any]) -> Picture:
    return np.asarray(render(Scene.from_json(scene), resolution=SIDE))


def opened(path: Path) -> Picture:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The folder of held-out prompts and the prompts of each task, as they come from a file."""
    folder = tmp_path_factory.mktemp("asked")
    prompts = write_task_prompts(folder, count=12, seed=3, resolution=SIDE, size="6x6")
    found: dict[str, list[dict[str, Any]]] = {task: [] for task in ASKED}
    for prompt in json.loads(json.dumps(prompts)):
        found[prompt["task"]].append(prompt)
    return folder, found


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("make", [*TRAINED.values(), ASKED["chat"]])
def test_all_scenes_of_a_record_are_of_its_split(
    make: Callable[..., SceneTask], split: Split
) -> None:
    rng = random.Random(5)
    records = [make(rng, split=split) for _ in range(12)]
    assert all(record.scenes for record in records)
    assert {split_of(scene) for record in records for scene in record.scenes} == {split}


@pytest.mark.parametrize("split", list(Split))
def test_the_frames_of_a_clip_differ_in_what_their_text_says(split: Split) -> None:
    rng = random.Random(5)
    for _ in range(12):
        frames = clip(rng, split=split)
        assert len(frames) == FRAMES
        assert {split_of(scene) for _, scene in frames} == {split}
        for (_, before), (text, after) in pairwise(frames):
            (old,), (new,) = before.objects, after.objects
            if text.startswith("It turns"):
                assert text == f"It turns {new.colour}."
                assert old.colour is not new.colour
            else:
                assert text == f"It is now {EN_PLACE[new.place]}."
                assert old.place is not new.place
            kept = [old.shape is new.shape, old.size is new.size, old.colour is new.colour]
            assert sum([*kept, old.place is new.place]) == 3


def test_prompts_are_held_out_and_their_pictures_show_what_is_expected(asked: Any) -> None:
    folder, prompts = asked
    for task, made in prompts.items():
        assert len({prompt["id"] for prompt in made}) == 12
        for prompt in made:
            expect = prompt["expect"]
            scenes = [*expect.get("scenes", []), *([expect["shown"]] if "shown" in expect else [])]
            assert all(split_of(Scene.from_json(scene)) is Split.val for scene in scenes)
            assert ("images" in prompt) == (task in ("x2i", "chat"))
            assert prompt.get("steps") == {"t2i": 1, "x2i": 1, "story": 2, "chat": None}[task]
            if "shown" in expect:
                (name,) = prompt["images"]
                seen = score(
                    read_scene(opened(folder / name)), scene=Scene.from_json(expect["shown"])
                )
                assert seen.found == seen.objects == seen.colour_correct == seen.place_correct


def test_the_truth_is_right_in_every_task_that_draws(asked: Any) -> None:
    _, prompts = asked
    for task in ("t2i", "x2i", "story"):
        for prompt in prompts[task]:
            pictures = [drawn(scene) for scene in prompt["expect"]["scenes"]]
            found = score_answer(prompt["expect"], text="", pictures=pictures)
            assert found.right, prompt
            assert len(found.pictures) == prompt["steps"]
            missing = score_answer(prompt["expect"], text="", pictures=pictures[:-1])
            assert not missing.right
            assert missing.pictures[-1].found == 0


def test_a_picture_left_as_it_was_is_no_edit(asked: Any) -> None:
    folder, prompts = asked
    for prompt in prompts["x2i"]:
        unedited = opened(folder / prompt["images"][0])
        assert not score_answer(prompt["expect"], text="", pictures=[unedited]).right
        (after,), before = prompt["expect"]["scenes"], prompt["expect"]["shown"]
        changed = [
            (old, new)
            for old, new in zip(before["objects"], after["objects"], strict=True)
            if old != new
        ]
        ((old, new),) = changed
        assert {**old, "colour": new["colour"]} == new
        assert f"the {old['colour']} {old['shape']} " in prompt["prompt"]
        assert prompt["prompt"].endswith(f" {new['colour']}.")


def test_the_pictures_of_a_story_have_an_order(asked: Any) -> None:
    _, prompts = asked
    assert {prompt["kind"] for prompt in prompts["story"]} == {"recolour", "move"}
    for prompt in prompts["story"]:
        first, second = (drawn(scene) for scene in prompt["expect"]["scenes"])
        for wrong in ([second, first], [first, first], [second, second]):
            assert not score_answer(prompt["expect"], text="", pictures=wrong).right


def test_an_answer_in_words_is_right_or_another_one(asked: Any) -> None:
    _, prompts = asked
    for prompt in prompts["chat"]:
        answer = prompt["expect"]["answer"]
        for text in (answer, f" {answer.capitalize()}.\n"):
            assert score_answer(prompt["expect"], text=text, pictures=[]).right
        others = {other["expect"]["answer"] for other in prompts["chat"]} - {answer}
        for other in ("", f"not {answer}", answer[:-1], *others):
            assert not score_answer(prompt["expect"], text=other, pictures=[]).right


def test_the_answer_is_what_the_picture_shows(asked: Any) -> None:
    """Read back from the pixels, for what one region alone can answer."""
    folder, prompts = asked
    kinds = Counter(prompt["kind"] for prompt in prompts["chat"])
    assert set(kinds) <= {"count", "colour", "place", "shape"}
    assert len(kinds) > 2
    for prompt in prompts["chat"]:
        found = read_scene(opened(folder / prompt["images"][0]))
        answer = prompt["expect"]["answer"]
        if prompt["kind"] == "count":
            assert answer == ("one", "two")[len(found) - 1]
        elif prompt["kind"] == "shape":
            (seen,) = [item for item in found if f" {item.colour}?" in prompt["prompt"]]
            assert answer == seen.shape
        else:
            (seen,) = [item for item in found if f"the {item.shape}?" in prompt["prompt"]]
            assert answer == (seen.colour if prompt["kind"] == "colour" else EN_PLACE[seen.place])


@pytest.mark.parametrize("task", list(TRAINED))
def test_the_reader_takes_every_record(tmp_path: Path, task: str) -> None:
    counted: list[int] = []
    path = write_task(
        tmp_path, task=task, count=6, seed=1, resolution=SIDE, progress=counted.append
    )
    assert counted == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = list(read_jsonl(path))
    assert [record.id for record in found] == [
        f"{task}.jsonl:{n + 1} {task}-{n:06d}" for n in range(6)
    ]
    pictures = 0
    for line, record in zip(lines, found, strict=True):
        assert isinstance(record, RawRecord), record
        assert record.several == {}
        words = "".join(part.text for part in record.parts if isinstance(part, RawText))
        for turn in line.get("turns", [line]):
            assert turn["prompt"] in words
            assert turn.get("answer", "") in words
        answers = [part for part in record.parts if isinstance(part, RawSpecial)]
        assert len(answers) == 2 * len(line.get("turns", [line])), "BSS and ESS of every turn"
        shown = [part for part in record.parts if isinstance(part, RawImage)]
        assert len(shown) == {"t2i": 1, "x2i": 2, "story": 2, "chat": 1}[task]
        pictures += len(shown)
    assert len(list((tmp_path / "images").iterdir())) == pictures


def test_the_reader_takes_every_clip(tmp_path: Path) -> None:
    path = write_clips(tmp_path, count=4, seed=1, resolution=SIDE)
    found = list(read_jsonl(path))
    assert [record.id for record in found] == [
        f"clips.jsonl:{n + 1} clip-{n:06d}" for n in range(4)
    ]
    for record in found:
        assert isinstance(record, RawRecord), record
        assert [type(part) for part in record.parts] == [RawText, RawImage] * FRAMES


def written(folder: Path, *, seed: int) -> dict[str, bytes]:
    """All files of a small corpus, by their path."""
    for task in TRAINED:
        write_task(folder, task=task, count=2, seed=seed, resolution=SIDE)
    write_clips(folder, count=2, seed=seed, resolution=SIDE)
    prompts = write_task_prompts(folder, count=2, seed=seed, resolution=SIDE, size="6x6")
    (folder / "prompts.json").write_text(json.dumps(prompts))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first = written(tmp_path / "a", seed=1)
    assert written(tmp_path / "b", seed=1) == first
    other = written(tmp_path / "c", seed=2)
    assert other.keys() == first.keys()
    for name in ("t2i.jsonl", "x2i.jsonl", "story.jsonl", "chat.jsonl", "clips.jsonl"):
        assert other[name] != first[name]
    assert other["prompts.json"] != first["prompts.json"]
