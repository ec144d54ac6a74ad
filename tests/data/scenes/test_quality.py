"""Prompts that name scenes, and what is made of the scores of their pictures."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from emu35.data.scenes.corpus import sample_prompts
from emu35.data.scenes.describe import Scene, Split, sample_scene
from emu35.data.scenes.quality import read_pictures, read_scene_prompts, summarise, wilson
from emu35.data.scenes.render import render
from emu35.errors import DataError


def scenes(count: int) -> list[Scene]:
    rng = random.Random(7)
    return [sample_scene(rng, split=Split.val) for _ in range(count)]


def test_true_pictures_are_right_and_missing_ones_are_wrong() -> None:
    asked = scenes(6)
    pictures = [np.asarray(render(scene)) for scene in asked]
    readings = read_pictures([*pictures[:3], None, None, None], scenes=asked)
    found = summarise([reading.score for reading in readings], pictures=3)
    objects = [len(scene.objects) for scene in asked]
    assert found.accuracy.value == sum(objects[:3]) / sum(objects)
    assert found.right.value == 0.5
    assert (found.prompts, found.pictures) == (6, 3)
    assert found.accuracy.low < found.accuracy.value < found.accuracy.high
    whole = read_pictures(pictures, scenes=asked)
    perfect = summarise([reading.score for reading in whole], pictures=6)
    assert (perfect.accuracy.low, perfect.accuracy.high) == (1.0, 1.0), "nothing to resample"
    assert perfect.right.low < 1, "six right ones do not prove that all are"


def test_more_prompts_narrow_the_interval() -> None:
    asked = scenes(4)
    pictures = [None, *(np.asarray(render(scene)) for scene in asked[1:])]
    scores = [reading.score for reading in read_pictures(pictures, scenes=asked)]
    few, many = (summarise(scores * times, pictures=3 * times) for times in (4, 64))
    width = [found.accuracy.high - found.accuracy.low for found in (few, many)]
    # Sixteen times as many: a quarter of the width.
    assert width[1] == pytest.approx(width[0] / 4, rel=0.15)


def test_the_interval_of_a_share_is_wilsons() -> None:
    share = wilson(8, count=10)
    assert (share.value, share.low, share.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert wilson(0, count=10).low == 0.0
    assert wilson(0, count=10).high == pytest.approx(0.2775, abs=1e-4)


def test_prompts_are_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    written = sample_prompts(count=5, seed=1)
    file.write_text("\n".join(json.dumps(prompt) for prompt in written) + "\n\n")
    assert len(read_scene_prompts(file)) == 5
    found = read_scene_prompts(file, count=3)
    assert [prompt.prompt for prompt in found] == [prompt["prompt"] for prompt in written[:3]]
    assert [prompt.scene.to_json() for prompt in found] == [item["scene"] for item in written[:3]]
    with pytest.raises(DataError, match="holds 5 prompts, but 6 are asked for"):
        read_scene_prompts(file, count=6)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty; it needs a prompt and its scene"),
        ("{", "line 1 is no JSON"),
        ('{"prompt": "a red circle"}', "line 1 names no scene to compare a picture with"),
        ('{"scene": {"background": "white", "objects": []}}', "line 1 names no scene|KeyError"),
        (
            '{"prompt": "x", "scene": {"background": "white", "objects": []}}',
            "line 1 has an empty prompt or an empty scene",
        ),
        (
            '{"prompt": "x", "scene": {"background": "mauve", "objects": []}}',
            "'mauve' is not a valid Background",
        ),
    ],
)
def test_a_file_that_names_no_scenes_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=complaint):
        read_scene_prompts(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_scene_prompts(tmp_path / "none.jsonl")
