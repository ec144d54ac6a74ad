"""Captions that leave size and place open, and the scene that would be liked."""

from emu35.data.scenes.describe import Colour, Place, Scene, Shape, Size, Split
from emu35.data.scenes.wishes import sample_wishes, wish_split


def test_captions_name_shape_and_colour_alone() -> None:
    prompts = sample_wishes(count=120, seed=3, split=Split.train)
    for prompt in prompts:
        (liked,) = Scene.from_json(prompt["scene"]).objects
        assert (liked.size, liked.place) == (Size.large, Place.centre)
        if prompt["language"] == "en":
            assert f"{liked.colour} {liked.shape}" in prompt["prompt"]
        said = prompt["prompt"].split()
        assert not {"large", "centre", "big", "middle"} & set(said)
    assert {prompt["language"] for prompt in prompts} == {"en", "zh"}


def test_no_object_is_on_both_sides_and_the_same_ones_come_each_time() -> None:
    sides = [sample_wishes(count=200, seed=3, split=split) for split in Split]
    objects = [
        {(o.shape, o.colour) for p in side for o in Scene.from_json(p["scene"]).objects}
        for side in sides
    ]
    assert not objects[0] & objects[1]
    assert objects[0] | objects[1] == {(shape, colour) for shape in Shape for colour in Colour}
    assert all(
        wish_split(*pair) is split
        for split, found in zip(Split, objects, strict=True)
        for pair in found
    )
    assert sides[0] == sample_wishes(count=200, seed=3, split=next(iter(Split)))
