"""Captions say what is in the scene, and held-out ones say all of it."""

import random

from emu35.data.scenes.captions import (
    EN_PLACE,
    ZH_COLOUR,
    ZH_PLACE,
    ZH_SHAPE,
    Detail,
    Language,
    caption,
)
from emu35.data.scenes.corpus import sample_caption
from emu35.data.scenes.describe import (
    Colour,
    Place,
    Scene,
    SceneObject,
    Shape,
    Size,
    Split,
    sample_scene,
)

RNG = random.Random(5)
SCENES = [sample_scene(RNG, split=Split.train) for _ in range(120)]


def test_full_captions_name_every_attribute() -> None:
    for scene in SCENES[:40]:
        for seed in range(8):
            english = caption(scene, rng=random.Random(seed), language=Language.en)
            chinese = caption(scene, rng=random.Random(seed), language=Language.zh)
            for item in scene.objects:
                wanted = f"{item.size} {item.colour} {item.shape} {EN_PLACE[item.place]}"
                assert wanted in english
                colour, shape = ZH_COLOUR[item.colour], ZH_SHAPE[item.shape]
                assert f"{colour}\u8272{shape}" in chinese
                assert ZH_PLACE[item.place] in chinese


def test_different_objects_never_share_a_full_caption() -> None:
    seen: dict[str, tuple[SceneObject, ...]] = {}
    rng = random.Random(0)
    for _ in range(3000):
        scene = sample_scene(rng, split=Split.train)
        text = caption(scene, rng=rng, language=rng.choice(list(Language)))
        assert seen.setdefault(text, scene.objects) == scene.objects


def test_no_held_out_caption_occurs_in_training() -> None:
    rng = random.Random(0)
    texts = {
        split: {
            sample_caption(sample_scene(rng, split=split), rng=rng, split=split)[1]
            for _ in range(1500)
        }
        for split in Split
    }
    assert not texts[Split.train] & texts[Split.val]


def test_phrasings_vary_and_both_languages_occur() -> None:
    texts = {
        caption(SCENES[0], rng=random.Random(seed), language=language)
        for seed in range(40)
        for language in Language
    }
    assert len(texts) == 8


def test_brief_captions_count_equal_objects() -> None:
    twin = {"shape": Shape.star, "colour": Colour.orange, "size": Size.small}
    scene = Scene(
        objects=(
            SceneObject(**twin, place=Place.top_left),
            SceneObject(**twin, place=Place.bottom_right),
            SceneObject(
                shape=Shape.circle, colour=Colour.blue, size=Size.small, place=Place.bottom_left
            ),
        )
    )
    brief = {
        caption(scene, rng=random.Random(seed), language=Language.en, detail=Detail.brief)
        for seed in range(20)
    }
    assert brief == {
        "two orange stars and a blue circle",
        "A picture of two orange stars and a blue circle.",
    }


def test_articles() -> None:
    scene = Scene(
        objects=(
            SceneObject(shape=Shape.square, colour=Colour.orange, size=Size.large, place=Place.top),
        )
    )
    text = caption(scene, rng=random.Random(1), language=Language.en, detail=Detail.brief)
    assert "an orange square" in text
