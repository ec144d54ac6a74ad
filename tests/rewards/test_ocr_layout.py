"""Texts in their boxes, in others' boxes, and beside them."""

from typing import Any, TypeAlias

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from reward_samples import numbers, sample

from emu35.config.reward_local import OcrLayoutRewardConfig
from emu35.rewards.boxes import around
from emu35.rewards.ocr_layout import OcrLayoutReward
from emu35.rewards.sample import Picture

pytest.importorskip("rapidocr", reason="needs the extra 'rewards'")

Layout: TypeAlias = dict[str, Any]

PLACES = {"OPEN": (0.28, 0.2), "CLOSED": (0.65, 0.8)}


def drawn(texts: dict[str, tuple[float, float]], side: int = 256) -> tuple[Picture, list[Layout]]:
    """A picture of ``texts`` at their middles, and the layout that it has."""
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(36)
    layout: list[Layout] = []
    for text, (x, y) in texts.items():
        place = (x * side, y * side)
        draw.text(place, text, fill="black", font=font, anchor="mm")
        x0, y0, x1, y1 = draw.textbbox(place, text, font=font, anchor="mm")
        layout.append({"text": text, "box": [x0 / side, y0 / side, x1 / side, y1 / side]})
    return np.asarray(image), layout


@pytest.fixture(scope="module")
def reward() -> OcrLayoutReward:
    return OcrLayoutReward(OcrLayoutRewardConfig())


def test_texts_in_their_boxes_are_right_and_swapped_ones_are_not(reward: OcrLayoutReward) -> None:
    shown, layout = drawn(PLACES)
    swapped, _ = drawn({"OPEN": PLACES["CLOSED"], "CLOSED": PLACES["OPEN"]})
    one, _ = drawn({"OPEN": PLACES["OPEN"]})
    spare, _ = drawn({**PLACES, "NOW": (0.25, 0.5)})
    blank = np.full_like(shown, 255)
    pictures = [shown, swapped, one, spare, blank]
    scores = numbers(reward, *(sample(picture, layout=layout) for picture in pictures))
    assert scores[0] == pytest.approx(1, abs=0.15)
    assert scores[1] < 0.35
    assert scores[2] == pytest.approx(scores[0] / 2, abs=0.05)
    assert scores[3] == pytest.approx(scores[0] * 2 / 3, abs=0.05)
    assert scores[4] == 0


def test_an_item_may_be_broken_over_lines(reward: OcrLayoutReward) -> None:
    shown, layout = drawn({"GOOD": (0.5, 0.4), "DAYS": (0.5, 0.6)})
    box = around(item["box"] for item in layout)
    (score,) = numbers(reward, sample(shown, layout=[{"text": "Good days", "box": [*box]}]))
    assert score > 0.85


def test_a_text_beside_its_box_is_worth_nothing_and_one_nearby_a_little(
    reward: OcrLayoutReward,
) -> None:
    _, layout = drawn({"OPEN": (0.3, 0.2)})
    beside, _ = drawn({"OPEN": (0.3, 0.8)})
    nearby, _ = drawn({"OPEN": (0.4, 0.2)})
    far, near = numbers(reward, sample(beside, layout=layout), sample(nearby, layout=layout))
    assert far == 0
    assert 0.3 < near < 0.95


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (None, "needs layout"),
        ([], "needs layout"),
        ([{"box": [0, 0, 1, 1]}], "item 1 of its layout has no text"),
        ([{"text": " ", "box": [0, 0, 1, 1]}], "nothing to read"),
        ([{"text": "A", "box": [0, 0, 1]}], "four numbers"),
        ([{"text": "A", "box": [0, 0, 1, "b"]}], "no number"),
        ([{"text": "A", "box": [0.5, 0, 0.2, 1]}], "x0 < x1"),
        ([{"text": "A", "box": [0, 0, 64, 64]}], "shares of width"),
    ],
)
def test_a_layout_that_is_none_is_told_beforehand(
    reward: OcrLayoutReward, layout: object, message: str
) -> None:
    (problem,) = reward.problems({"layout": layout})
    assert message in problem
    assert reward.problems({"layout": [{"text": "A", "box": [0, 0, 1, 0.5]}]}) == []
