"""Pictures of words, and samples that hold pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emu35.rewards.sample import Picture, Reward, Sample


def words(
    *texts: str, side: int = 128, size: int = 24, colour: str = "black", background: str = "white"
) -> Picture:
    """A square picture of ``texts``, one below the other, in the font that comes with Pillow."""
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    for number, text in enumerate(texts):
        place = (side / 2, side * (number + 0.5) / len(texts))
        draw.text(place, text, fill=colour, font=ImageFont.load_default(size), anchor="mm")
    return np.asarray(image)


def sample(*pictures: Picture, references: tuple[Picture, ...] = (), **record: Any) -> Sample:
    """An answer of ``pictures`` to a prompt with the keys ``record``."""
    return Sample(
        record={"prompt": "draw", **record},
        task="t2i",
        prompt="draw",
        texts=[""] * (len(pictures) + 1),
        pictures=pictures,
        references=references,
    )


def numbers(reward: Reward, *samples: Sample) -> Sequence[float]:
    """The scores of ``samples``, all of which must have one, within the reward's range."""
    found: list[float] = []
    for score in reward.score(samples):
        assert isinstance(score, float), score
        assert min(reward.range.low, reward.range.high) <= score
        assert score <= max(reward.range.low, reward.range.high)
        found.append(score)
    assert len(found) == len(samples)
    return found
