"""Words that were drawn are read back; words that were not are not."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reward_samples import numbers, sample, words

from emu35.config.reward_local import OcrRewardConfig
from emu35.errors import ConfigError
from emu35.rewards.ocr import OcrReward
from emu35.rewards.sample import Score, Unscored

pytest.importorskip("rapidocr", reason="needs the extra 'rewards'")


@pytest.fixture(scope="module")
def reward() -> OcrReward:
    return OcrReward(OcrRewardConfig())


def test_words_are_read_from_small_and_large_pictures(reward: OcrReward) -> None:
    pictures = {
        "BUS": words("BUS", side=64),
        "Hello World": words("Hello", "World", side=256, size=40, colour="red"),
        "42": words("42", side=512, size=200, background="yellow"),
    }
    samples = [sample(picture, text=text) for text, picture in pictures.items()]
    assert numbers(reward, *samples) == [1.0, 1.0, 1.0]


def test_wrong_missing_and_spare_words_cost_what_they_are_worth(reward: OcrReward) -> None:
    shown = words("OPEN", "SHOP")
    blank = np.full((64, 64, 3), 255, dtype=np.uint8)
    asked = [
        sample(shown, text=["SHOP", "OPEN"]),
        sample(shown, text="OPEN"),
        sample(words("OPEN"), text="OVEN"),
        sample(blank, text="OPEN"),
    ]
    assert list(reward.score(asked)) == pytest.approx([1.0, 0.5, 0.75, 0.0])


def test_pictures_of_any_shape_are_read_or_found_empty(reward: OcrReward) -> None:
    banner = np.concatenate([words("SALE", side=64), np.full((64, 1500, 3), 255, np.uint8)], axis=1)
    thread = np.zeros((1, 3000, 3), dtype=np.uint8)
    dot = np.zeros((1, 1, 3), dtype=np.uint8)
    shown = [sample(picture, text="SALE") for picture in (banner, thread, dot)]
    assert numbers(reward, *shown) == [1.0, 0.0, 0.0]


def test_case_counts_only_where_it_is_asked_for(reward: OcrReward) -> None:
    strict = OcrReward(OcrRewardConfig(ignore_case=False))
    answer = sample(words("Hello"), text="HELLO")
    assert list(reward.score([answer])) == [1.0]
    assert list(strict.score([answer])) == pytest.approx([0.2])


def test_chinese_is_read(reward: OcrReward) -> None:
    with Image.open(Path(__file__).with_name("hello_world_chinese.png")) as image:
        shown = np.asarray(image.convert("RGB"))
    right, half = sample(shown, text="你好世界"), sample(shown, text="你好朋友")
    assert list(reward.score([right, half])) == [1.0, 0.5]


def test_an_answer_without_a_picture_has_no_score(reward: OcrReward) -> None:
    (score,) = reward.score([sample(text="BUS")])
    assert isinstance(score, Unscored)
    assert "no picture" in score.reason


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "needs the words"),
        ({"text": 7}, "string or a list"),
        ({"text": ["a", None]}, "string or a list"),
        ({"text": []}, "nothing to read"),
        ({"text": ["a", " "]}, "nothing to read"),
    ],
)
def test_a_record_without_words_is_told_beforehand(
    reward: OcrReward, record: dict[str, object], message: str
) -> None:
    (problem,) = reward.problems(record)
    assert message in problem
    assert reward.problems({"text": "BUS"}) == reward.problems({"text": ["BUS", "42"]}) == []


def test_many_threads_read_what_one_does(reward: OcrReward) -> None:
    texts = ["BUS", "STOP", "TAXI", "OPEN"] * 2
    samples = [sample(words(text, side=64, size=20), text=text) for text in texts]
    shuffled = [sample(item.pictures[0], text="BUS") for item in samples]

    def one(index: int) -> Score:
        return reward.score([shuffled[index]])[0]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(8))) == list(reward.score(shuffled))


def test_nothing_is_fetched_from_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    fresh = OcrReward(OcrRewardConfig())
    assert list(fresh.score([sample(words("BUS"), text="BUS")])) == [1.0]


def test_a_missing_model_or_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no model .*gone\.onnx"):
        OcrReward(OcrRewardConfig(detector=str(tmp_path / "gone.onnx")))
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ConfigError, match=r"emu35\[rewards\]"):
        OcrReward(OcrRewardConfig())
