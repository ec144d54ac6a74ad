"""Scenes: their geometry, their JSON form and the divide between train and held-out."""

import random

import pytest

from emu35.data.scenes.describe import (
    RGB,
    Background,
    Colour,
    Place,
    Scene,
    SceneObject,
    Shape,
    Size,
    Split,
    outline,
    sample_scene,
    split_of,
)


def scenes(count: int, *, split: Split = Split.train, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, split=split) for _ in range(count)]


def test_json_round_trip() -> None:
    for scene in scenes(50):
        assert Scene.from_json(scene.to_json()) == scene


def test_unknown_attribute_is_refused() -> None:
    value = scenes(1)[0].to_json()
    value["objects"][0]["colour"] = "mauve"
    with pytest.raises(ValueError, match="mauve"):
        Scene.from_json(value)


def test_sides_of_the_divide_are_disjoint_and_about_a_tenth_is_held_out() -> None:
    held_out = {scene.objects for scene in scenes(300, split=Split.val)}
    trained = {scene.objects for scene in scenes(2000, split=Split.train)}
    assert not held_out & trained
    every = [
        Scene(objects=(SceneObject(shape=shape, colour=colour, size=size, place=place),))
        for shape in Shape
        for colour in Colour
        for size in Size
        for place in Place
    ]
    share = sum(split_of(scene) is Split.val for scene in every) / len(every)
    assert 0.06 < share < 0.14


def test_the_side_does_not_depend_on_what_a_caption_may_leave_out() -> None:
    for scene in scenes(100, seed=3):
        other = Scene(
            objects=tuple(reversed(scene.objects)),
            background=next(b for b in Background if b is not scene.background),
        )
        assert split_of(other) is split_of(scene)


def test_objects_stay_inside_and_apart() -> None:
    for scene in scenes(300, seed=1):
        boxes = []
        for item in scene.objects:
            points = outline(item.shape, centre=item.centre, diameter=item.diameter)
            xs, ys = [x for x, _ in points], [y for _, y in points]
            boxes.append((min(xs), min(ys), max(xs), max(ys)))
        assert all(0 < value < 1 for box in boxes for value in box)
        for index, (left, top, right, bottom) in enumerate(boxes):
            for other in boxes[index + 1 :]:
                assert right < other[0] or other[2] < left or bottom < other[1] or other[3] < top, (
                    scene
                )


def test_every_attribute_occurs() -> None:
    items = [item for scene in scenes(600, seed=2) for item in scene.objects]
    assert {item.shape for item in items} == set(Shape)
    assert {item.colour for item in items} == set(Colour)
    assert {(item.size, item.place) for item in items} >= {(s, p) for s in Size for p in Place}
    assert {len(scene.objects) for scene in scenes(100)} == {1, 2, 3}


def test_colours_are_far_apart_in_hue() -> None:
    import colorsys

    hues = sorted(360 * colorsys.rgb_to_hsv(*(c / 255 for c in rgb))[0] for rgb in RGB.values())
    gaps = [(b - a) % 360 for a, b in zip(hues, [*hues[1:], hues[0]], strict=True)]
    assert min(gaps) > 20
