"""Stories as protobuf: the official schema, there and back, and the official writer's habits."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from emu35.data.story import (
    Clip,
    Picture,
    PictureFormat,
    Segment,
    Story,
    StoryImage,
    TimeSpan,
    build_story,
    decode_story,
    encode_story,
    read_picture,
)
from emu35.data.story_schema import message_classes
from emu35.errors import DataError
from emu35.tokens.answer import Answer, AnswerImage, AnswerText


@pytest.fixture(scope="module")
def golden_schema(golden_folder: Path) -> dict[str, list[list[Any]]]:
    text = (golden_folder / "pipeline.json").read_text(encoding="utf-8")
    return json.loads(text)["proto_schema"]


def encoded(format: str = "PNG", *, width: int = 3, height: int = 2) -> bytes:
    stream = io.BytesIO()
    PillowImage.new("RGB", (width, height), "teal").save(stream, format=format)
    return stream.getvalue()


@pytest.mark.golden
def test_every_field_has_the_official_number_and_type(golden_schema: dict[str, list[list[Any]]]):
    classes = message_classes()
    assert set(classes) == set(golden_schema)
    for name, fields in golden_schema.items():
        ours = {(f.name, f.number, f.type) for f in classes[name].DESCRIPTOR.fields}
        assert ours == {(field, number, kind) for field, number, kind, _ in fields}


def test_what_the_golden_schema_leaves_open():
    classes = message_classes()
    fields = {
        f"{name}.{field.name}": field
        for name, made in classes.items()
        for field in made.DESCRIPTOR.fields
    }
    assert {name for name, field in fields.items() if field.is_repeated} == {
        *("ImageMeta.features", "ImageMeta.scores", "Segment.images", "Clip.segments"),
        *("Story.clips", "Story.reference_images"),
    }
    assert fields["Story.reference_images"].message_type.full_name == "emu3p5.story.ImageMeta"
    assert fields["Image.format"].enum_type.values_by_name["BMP"].number == 4
    scores = fields["ImageMeta.scores"].message_type
    assert scores.full_name == "emu3p5.story.ImageMeta.ScoresEntry"
    assert scores.fields_by_name["value"].type == FieldDescriptor.TYPE_DOUBLE
    assert scores.fields_by_name["value"].number == 2


def test_bytes_on_the_wire():
    """Assembled by hand: key = number << 3 | wire type, then length and content."""
    picture = b"\x08\x03\x10\x02\x18\x02\x22\x01x"  # width 3, height 2, PNG, image_data "x"
    image = b"\x3a\x01t\x5a" + bytes([len(picture)]) + picture + b"\x60\x01"  # -1, zigzag
    segment = b"\x12\x02hi\xaa\x06" + bytes([len(image)]) + image  # 101 << 3 | 2 = 0x32a
    clip = b"\x0a\x09clip_0000\xaa\x06" + bytes([len(segment)]) + segment
    content = b"\x12" + bytes([len(clip)]) + clip + b"\x5a\x01s\x62\x01q"
    story = Story(
        question="q",
        summary="s",
        clips=[
            Clip(
                clip_id="clip_0000",
                segments=[
                    Segment(
                        asr="hi",
                        images=[
                            StoryImage(
                                chain_of_thought="t",
                                is_keyframe_status=-1,
                                image=Picture(
                                    width=3, height=2, format=PictureFormat.PNG, image_data=b"x"
                                ),
                            )
                        ],
                    )
                ],
            )
        ],
    )
    assert decode_story(content) == story
    assert encode_story(story) == content


words = st.text(max_size=8)
numbers = st.floats(allow_nan=False)
spans = st.none() | st.builds(TimeSpan, start=numbers, end=numbers)
signed = st.integers(-(2**31), 2**31 - 1)
pictures = st.none() | st.builds(
    Picture,
    width=signed,
    height=signed,
    format=st.sampled_from(PictureFormat),
    image_data=st.binary(max_size=8),
    image_path=words,
)
images = st.lists(
    st.builds(
        StoryImage,
        image_id=words,
        timestamp=spans,
        caption=words,
        detail_caption=words,
        features=st.dictionaries(words, st.binary(max_size=4), max_size=3),
        scores=st.dictionaries(words, numbers, max_size=3),
        chain_of_thought=words,
        cot_translate=words,
        image=pictures,
        is_keyframe_status=signed,
    ),
    max_size=2,
)
segments = st.builds(
    Segment, timestamp=spans, asr=words, caption=words, asr_translate=words, images=images
)
clips = st.builds(
    Clip,
    clip_id=words,
    timestamp=spans,
    story=words,
    caption=words,
    segments=st.lists(segments, max_size=2),
)
stories = st.builds(
    Story,
    story_id=words,
    clips=st.lists(clips, max_size=2),
    deprecated=st.booleans(),
    deprecate_reason=words,
    summary=words,
    question=words,
    refined_summary=words,
    question_translate=words,
    summary_translate=words,
    refined_summary_translate=words,
    reference_images=images,
)


@settings(max_examples=100, deadline=None)
@given(stories)
def test_a_story_survives_the_way_there_and_back(story: Story):
    assert decode_story(encode_story(story)) == story


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_a_story_or_a_clear_error(content: bytes):
    with contextlib.suppress(DataError):
        made = encode_story(decode_story(content))
        assert encode_story(decode_story(made)) == made


def test_damaged_bytes_are_named():
    content = encode_story(Story(question="what is this?"))
    with pytest.raises(DataError, match="was the file written whole"):
        decode_story(content[:-1])
    with pytest.raises(DataError, match="UTF-8"):
        decode_story(b"\x62\x01\xff")
    assert decode_story(b"") == Story()


def test_unknown_fields_and_formats_are_ignored():
    unknown = b"\xf2\x3e\x03abc"  # field 1006
    assert decode_story(unknown + b"\x62\x01q" + unknown) == Story(question="q")
    reference = b"\x8a\x01\x04\x5a\x02\x18\x63"  # reference_images[0].image.format = 99
    (image,) = decode_story(reference).reference_images
    assert image.image == Picture(format=PictureFormat.UNKNOWN)


def test_an_empty_picture_is_not_no_picture():
    story = Story(reference_images=[StoryImage(image=Picture()), StoryImage(image=None)])
    assert decode_story(encode_story(story)) == story


def test_what_does_not_fit_is_refused_and_what_is_no_text_is_replaced():
    with pytest.raises(DataError, match="must fit 32 bits"):
        encode_story(Story(reference_images=[StoryImage(image=Picture(width=2**31))]))
    assert decode_story(encode_story(Story(question="a\udcffb"))).question == "a?b"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_pictures_of_all_formats(format: str):
    content = encoded(format)
    assert read_picture(content) == Picture(
        width=3, height=2, format=PictureFormat[format], image_data=content
    )


@pytest.mark.parametrize("content", [b"", b"not a picture", encoded("GIF"), encoded()[:20]])
def test_what_is_no_picture(content: bytes):
    with pytest.raises(DataError, match="no picture that a story can hold"):
        read_picture(content)


def answer_image(thought: str | None = None) -> AnswerImage:
    return AnswerImage(np.zeros((1, 1), dtype=np.int64), thought=thought)


def test_clips_by_the_official_habits():
    answer = Answer(
        thought="plan",
        parts=[
            AnswerText("one"),
            answer_image("a cat"),
            AnswerText("\n"),
            answer_image(),
            AnswerText("two"),
            AnswerText("three"),
            answer_image(),
        ],
    )
    made = [Picture(width=number) for number in range(3)]
    reference = read_picture(encoded())
    story = build_story(
        answer, question="how?", pictures=made, references=[reference], story_id="007"
    )
    assert (story.story_id, story.question, story.summary) == ("007", "how?", "plan")
    assert [clip.clip_id for clip in story.clips] == ["clip_0000", "clip_0001", "clip_0002"]
    assert [segment.asr for segment in story.segments] == ["one", "two", "three"]
    assert [[i.image for i in segment.images] for segment in story.segments] == [
        made[:2],
        [],
        made[2:],
    ]
    assert [image.chain_of_thought for image in story.images] == ["a cat", "", ""]
    assert [image.image for image in story.reference_images] == [reference]
    assert decode_story(encode_story(story)) == story


def test_an_answer_that_begins_with_an_image():
    answer = Answer(thought=None, parts=[answer_image(), AnswerText("so")])
    story = build_story(answer, question="", pictures=[Picture()])
    assert [(clip.clip_id, clip.segments[0].asr) for clip in story.clips] == [
        ("clip_0000", ""),
        ("clip_0001", "so"),
    ]
    assert len(story.segments[0].images) == 1
    assert build_story(Answer(thought=None, parts=[]), question="", pictures=[]).clips == []


def test_a_picture_for_every_image():
    with pytest.raises(ValueError, match="1 images but 0 pictures"):
        build_story(Answer(thought=None, parts=[answer_image()]), question="", pictures=[])


def test_the_official_names_may_be_taken_in_the_same_process():
    """The official package registers the same messages in protobuf's default pool."""
    from google.protobuf import descriptor_pb2, descriptor_pool

    official = descriptor_pb2.FileDescriptorProto(name="official.proto", package="emu3p5.story")
    official.message_type.add(name="Story")
    descriptor_pool.Default().AddSerializedFile(official.SerializeToString())
    assert set(message_classes()) >= {"Story"}
