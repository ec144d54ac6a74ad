"""The reader of scenes: right on what was rendered, also when blurred, and fooled by nothing."""

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from emu35.data.scenes.describe import Scene, Split, sample_scene
from emu35.data.scenes.render import render
from emu35.data.scenes.verify import Accuracy, accuracy, chance, read_scene, score

RNG = random.Random(11)
SCENES = [sample_scene(RNG, split=Split.train) for _ in range(150)]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(1.5))


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 20, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def compressed(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=30)
    return Image.open(stream).convert("RGB")


def coarse(image: Image.Image) -> Image.Image:
    """As a decoder with too few channels would see it."""
    small = image.reduce(3)
    return small.resize(image.size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("damage", "least"),
    [(None, 0.99), (blurred, 0.99), (noisy, 0.95), (compressed, 0.95), (coarse, 0.95)],
    ids=["clean", "blur", "noise", "jpeg", "coarse"],
)
def test_reads_back_what_was_rendered(damage, least: float) -> None:
    scores = []
    for scene in SCENES:
        image = render(scene)
        found = read_scene(pixels(damage(image) if damage else image))
        scores.append(score(found, scene=scene))
    got = accuracy(scores)
    for name in ("colour", "shape", "size", "place", "count"):
        assert getattr(got, name) >= least, got


def test_reads_other_resolutions() -> None:
    for resolution in (64, 160):
        scores = [
            score(read_scene(pixels(render(scene, resolution=resolution))), scene=scene)
            for scene in SCENES[:40]
        ]
        got = accuracy(scores)
        assert min(got.colour, got.shape, got.count) >= 0.99, got


def test_an_empty_picture_and_pure_noise_hold_nothing_that_was_asked_for() -> None:
    for scene in SCENES[:5]:
        blank = np.full((96, 96, 3), 200, np.uint8)
        got = score(read_scene(blank), scene=scene)
        assert (got.found, got.colour_correct, got.shape_correct) == (0, 0, 0)
        assert not got.count_correct
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    overlaps = [item.overlap for item in read_scene(noise)]
    assert max(overlaps, default=0.0) < 0.6


def test_a_wrong_attribute_costs_exactly_that_attribute() -> None:
    scene = next(scene for scene in SCENES if len(scene.objects) == 2)
    first, second = scene.to_json()["objects"]
    altered = scene.to_json()
    altered["objects"] = [{**first, "colour": _other(first["colour"])}, second]
    got = score(read_scene(pixels(render(Scene.from_json(altered)))), scene=scene)
    assert (got.objects, got.colour_correct, got.shape_correct) == (2, 1, 2)
    assert got.place_correct == got.size_correct == 2


def _other(colour: str) -> str:
    return "red" if colour != "red" else "blue"


def test_a_missing_and_an_additional_object_are_noticed() -> None:
    pair = next(scene for scene in SCENES if len(scene.objects) == 2)
    single = Scene(objects=pair.objects[:1], background=pair.background)
    missing = score(read_scene(pixels(render(single))), scene=pair)
    assert (missing.found, missing.colour_correct, missing.count_correct) == (1, 1, False)
    extra = score(read_scene(pixels(render(pair))), scene=single)
    assert (extra.found, extra.colour_correct, extra.count_correct) == (2, 1, False)


def test_chance_is_that_of_a_model_that_ignores_its_caption() -> None:
    founds = [read_scene(pixels(render(scene))) for scene in SCENES]
    got = chance(founds, scenes=SCENES)
    assert got.colour == pytest.approx(1 / 8, abs=0.04)
    assert got.shape == pytest.approx(1 / 4, abs=0.05)


def test_a_habit_raises_chance() -> None:
    # Whatever was asked, the model draws the commonest scene of all: chance must show it.
    scene = SCENES[0]
    scenes = [scene] * 8 + SCENES[1:5]
    founds = [read_scene(pixels(render(scene)))] * 12
    assert chance(founds, scenes=scenes).colour > 0.4
    assert isinstance(chance(founds, scenes=scenes), Accuracy)
