"""The proxies order pictures as their names say, and stay within their range."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageFilter
from reward_samples import sample, words

from emu35.config.reward_local import AestheticsRewardConfig
from emu35.rewards.aesthetics import (
    AestheticsReward,
    colourfulness,
    contrast,
    exposure,
    sharpness,
)
from emu35.rewards.sample import Picture, Unscored


def flat(*colour: int) -> Picture:
    return np.full((48, 64, 3), colour, dtype=np.uint8)


def blurred(picture: Picture) -> Picture:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(3)))


def test_each_proxy_measures_what_it_is_called_after() -> None:
    shown = words("TAXI", colour="black", background="grey")
    assert sharpness(shown) > 2 * sharpness(blurred(shown)) > 0
    assert sharpness(flat(9, 9, 9)) == 0
    assert exposure(flat(128, 128, 128)) > 0.99
    assert exposure(flat(40, 40, 40)) == pytest.approx(80 / 255, abs=1e-6)
    assert exposure(flat(0, 0, 0)) == exposure(flat(255, 255, 255)) == 0
    assert contrast(flat(128, 128, 128)) == pytest.approx(0, abs=1e-12)
    assert contrast(words("TAXI")) > contrast(words("TAXI", background="grey")) > 0
    grey = flat(128, 128, 128)
    grey[:10] = 200
    assert colourfulness(grey) == 0
    half = flat(255, 0, 0)
    half[:24] = (0, 0, 255)
    assert colourfulness(half) > colourfulness(flat(140, 120, 120)) > 0


def test_weights_choose_and_pictures_are_averaged() -> None:
    only = AestheticsReward(
        AestheticsRewardConfig(sharpness=0, exposure=1, contrast=0, colourfulness=0)
    )
    bright, dark = flat(128, 128, 128), flat(0, 0, 0)
    scores = list(only.score([sample(bright), sample(dark), sample(bright, dark), sample()]))
    assert scores[:3] == pytest.approx([1, 0, 0.5], abs=0.01)
    assert isinstance(scores[3], Unscored)


@settings(max_examples=50, deadline=None)
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_any_picture_scores_within_the_range(picture: Picture) -> None:
    (score,) = AestheticsReward(AestheticsRewardConfig()).score([sample(picture)])
    assert isinstance(score, float)
    assert 0 <= score <= 1
