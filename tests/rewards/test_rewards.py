"""Rewards: found by name, checked before they are needed, and honest about failures."""

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emu35.data.scenes.describe import Colour, Scene, Shape, Split, sample_scene
from emu35.data.scenes.render import render
from emu35.errors import ConfigError, DataError
from emu35.rewards.build import find_reward
from emu35.rewards.sample import Picture, Sample, Score, Unscored

SCENES = [sample_scene(random.Random(n), split=Split.val) for n in range(12)]
SCENE = next(scene for scene in SCENES if len(scene.objects) == 2)


def scene_score(record: dict[str, Any], pictures: Sequence[Picture]) -> Score:
    return find_reward("scene").score(sample(record, pictures))


def sample(record: dict[str, Any], pictures: Sequence[Picture] = ()) -> Sample:
    texts = [""] * (len(pictures) + 1)
    return Sample(
        record=record, task="t2i", prompt="", texts=texts, pictures=pictures, where="line 1"
    )


def drawn(scene: dict[str, Any]) -> np.ndarray:
    return np.asarray(render(Scene.from_json(scene), resolution=128).convert("RGB"))


def test_a_scene_is_worth_the_share_of_its_attributes_that_are_right() -> None:
    record = {"scene": SCENE.to_json()}
    assert scene_score(record, [drawn(SCENE.to_json())]) == 1.0
    other = SCENE.to_json()
    first = other["objects"][0]
    first["colour"] = next(str(colour) for colour in Colour if str(colour) != first["colour"])
    assert scene_score(record, [drawn(other)]) == pytest.approx(7 / 8)
    first["shape"] = next(str(shape) for shape in Shape if str(shape) != first["shape"])
    assert scene_score(record, [drawn(other)]) == pytest.approx(6 / 8)
    blank = np.full((64, 64, 3), 255, dtype=np.uint8)
    assert scene_score(record, [blank]) == 0.0
    assert scene_score(record, []) == 0.0


def test_several_pictures_are_compared_in_order_and_a_missing_one_shows_nothing() -> None:
    one, other = [scene for scene in SCENES if len(scene.objects) == 1][:2]
    record = {"expect": {"scenes": [one.to_json(), other.to_json()]}}
    pictures = [drawn(one.to_json()), drawn(other.to_json())]
    assert scene_score(record, pictures) == 1.0
    assert scene_score(record, pictures[:1]) == 0.5
    swapped = scene_score(record, pictures[::-1])
    assert isinstance(swapped, float)
    assert swapped < 1.0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "reward scene needs what the picture should show under scene"),
        ({"scene": None, "expect": {"answer": "red"}}, "reward scene needs"),
        ({"scene": {"background": "white", "objects": [{"shape": "blob"}]}}, "blob"),
        ({"scene": {"objects": []}}, "background"),
        ({"scene": "a red circle"}, "its scene is none"),
        ({"scene": {"background": "white", "objects": []}}, "no object"),
    ],
)
def test_a_record_without_a_scene_is_told_beforehand(record: dict[str, Any], message: str) -> None:
    (problem,) = find_reward("scene").problems(record)
    assert message in problem
    score = scene_score(record, [])
    assert isinstance(score, Unscored)
    assert message in score.reason


OWN = """
def length(record, pictures):
    return len(record["prompt"])

def nothing(record, pictures):
    return float("nan")

def words(record, pictures):
    return "good"

def fails(record, pictures):
    return pictures[7]

constant = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of rewards that a user wrote."""
    (tmp_path / "own_rewards.py").write_text(OWN)
    (tmp_path / "torn_rewards.py").write_text("def length(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    return "own_rewards"


def test_a_function_of_ones_own(own: str) -> None:
    reward = find_reward(f"{own}:length")
    assert reward.problems({"prompt": "four"}) == []
    assert reward.score(sample({"prompt": "four"})) == 4.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "nothing failed on line 1: gave nan"),
        ("words", "gave 'good'"),
        ("fails", "IndexError.*line 12"),
    ],
)
def test_what_is_no_number_is_never_replaced_by_one(own: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_reward(f"{own}:{name}").score(sample({"prompt": ""}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scenes", "Did you mean 'scene'"),
        ("own_rewards:lenght", "lenght does not exist in .*own_rewards.py"),
        ("own_rewards:constant", "constant is no function"),
        ("torn_rewards:length", "cannot be imported .invalid syntax"),
        ("no.such.module:length", "no.such.module cannot be imported"),
        ("own_rewards:", "names no function"),
        ("function", "has to be configured"),
    ],
)
def test_a_name_that_is_no_reward_is_refused(own: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_reward(name)
