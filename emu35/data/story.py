"""Stories: interleaved answers as files that the official Emu3.5 viewer reads.

The protobuf messages of :mod:`~emu35.data.story_schema` as plain dataclasses, to bytes and back,
and the official writer's conventions: one clip of one segment per text, an image goes to the last
clip, an answer that begins with an image begins with a clip without text.

Fields keep their official names. A story that comes from elsewhere keeps everything this schema
knows; fields it does not know are ignored.
"""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, TypeAlias, cast

from google.protobuf.message import DecodeError, EncodeError
from PIL import Image as PillowImage

from emu35.data.story_schema import FIELDS, message_classes
from emu35.errors import DataError
from emu35.tokens.answer import Answer, AnswerText

MAX_BYTES = 2**31 - 1
"""Largest message that protobuf defines."""


class PictureFormat(IntEnum):
    """How the bytes of a picture are encoded."""

    UNKNOWN = 0
    JPEG = 1
    PNG = 2
    WEBP = 3
    BMP = 4


@dataclass(kw_only=True, slots=True)
class TimeSpan:
    """Seconds in the video that something was taken from."""

    start: float = 0.0
    end: float = 0.0


@dataclass(kw_only=True, slots=True)
class Picture:
    """An encoded picture, its size in pixels; ``image_path`` where the bytes lie in a file."""

    width: int = 0
    height: int = 0
    format: PictureFormat = PictureFormat.UNKNOWN
    image_data: bytes = b""
    image_path: str = ""


@dataclass(kw_only=True, slots=True)
class StoryImage:
    """A picture and what is known of it; ``chain_of_thought`` is what was thought before it."""

    image_id: str = ""
    timestamp: TimeSpan | None = None
    caption: str = ""
    detail_caption: str = ""
    features: dict[str, bytes] = field(default_factory=dict[str, bytes])
    scores: dict[str, float] = field(default_factory=dict[str, float])
    chain_of_thought: str = ""
    cot_translate: str = ""
    image: Picture | None = None
    is_keyframe_status: int = 0


@dataclass(kw_only=True, slots=True)
class Segment:
    """A text (``asr``: in training data it was recognised speech) and the pictures that follow."""

    timestamp: TimeSpan | None = None
    asr: str = ""
    caption: str = ""
    asr_translate: str = ""
    images: list[StoryImage] = field(default_factory=list[StoryImage])


@dataclass(kw_only=True, slots=True)
class Clip:
    """A stretch of a story; generated ones hold exactly one segment."""

    clip_id: str = ""
    timestamp: TimeSpan | None = None
    story: str = ""
    caption: str = ""
    segments: list[Segment] = field(default_factory=list[Segment])


@dataclass(kw_only=True, slots=True)
class Story:
    """A question, reference pictures, the answer; ``summary`` is its global chain of thought."""

    story_id: str = ""
    clips: list[Clip] = field(default_factory=list[Clip])
    deprecated: bool = False
    deprecate_reason: str = ""
    summary: str = ""
    question: str = ""
    refined_summary: str = ""
    question_translate: str = ""
    summary_translate: str = ""
    refined_summary_translate: str = ""
    reference_images: list[StoryImage] = field(default_factory=list[StoryImage])

    @property
    def segments(self) -> list[Segment]:
        """The segments of all clips, in order."""
        return [segment for clip in self.clips for segment in clip.segments]

    @property
    def images(self) -> list[StoryImage]:
        """The images of the answer, in order; reference images are not among them."""
        return [image for segment in self.segments for image in segment.images]


_Item: TypeAlias = TimeSpan | Picture | StoryImage | Segment | Clip | Story
_ITEMS: dict[str, type[_Item]] = {
    "TimeStamp": TimeSpan,
    "Image": Picture,
    "ImageMeta": StoryImage,
    "Segment": Segment,
    "Clip": Clip,
    "Story": Story,
}
_MESSAGES = message_classes()
_FORMATS = frozenset(format.value for format in PictureFormat)


def encode_story(story: Story) -> bytes:
    """``story`` as protobuf bytes. Characters that have no UTF-8 (lone surrogates) become ``?``.

    Raises:
        DataError: a number does not fit its field, or the story is larger than protobuf permits.
    """
    message = _MESSAGES["Story"]()
    try:
        _fill(message, story)
        return message.SerializeToString(deterministic=True)
    except (ValueError, EncodeError) as error:
        raise DataError(
            f"the story cannot be written as protobuf ({error}); numbers must fit 32 bits and the "
            f"whole story {MAX_BYTES} bytes"
        ) from error


def decode_story(content: bytes) -> Story:
    """The story in ``content``; an unknown picture format becomes ``UNKNOWN``.

    Raises:
        DataError: the bytes are no story, or a damaged one.
    """
    if len(content) > MAX_BYTES:
        raise DataError(f"{len(content)} bytes are no protobuf message; at most {MAX_BYTES} can be")
    message = _MESSAGES["Story"]()
    try:
        message.ParseFromString(content)
    except DecodeError as error:
        raise DataError(
            f"{len(content)} bytes are no emu3p5.story protobuf, or a damaged one ({error}); "
            "was the file written whole, and by emu35 generate or the official code?"
        ) from error
    return cast(Story, _item(message))


def build_story(
    answer: Answer,
    *,
    question: str,
    pictures: Sequence[Picture],
    references: Sequence[Picture] = (),
    story_id: str = "",
) -> Story:
    """The story of ``answer``, by the official writer's conventions.

    ``pictures`` are the answer's images, decoded, in order. White space between parts makes no
    clip of its own.

    Raises:
        ValueError: unless there is one picture for every image of the answer.
    """
    if len(pictures) != len(answer.images):
        raise ValueError(f"{len(answer.images)} images but {len(pictures)} pictures")
    story = Story(
        story_id=story_id,
        question=question,
        summary=answer.thought or "",
        reference_images=[StoryImage(image=picture) for picture in references],
    )

    def add_clip(text: str) -> None:
        clip_id = f"clip_{len(story.clips):04d}"
        story.clips.append(Clip(clip_id=clip_id, segments=[Segment(asr=text)]))

    remaining = iter(pictures)
    for part in answer.parts:
        if isinstance(part, AnswerText):
            if part.text.strip():
                add_clip(part.text)
            continue
        if not story.clips:
            add_clip("")
        image = StoryImage(image=next(remaining), chain_of_thought=part.thought or "")
        story.clips[-1].segments[0].images.append(image)
    return story


def read_picture(content: bytes) -> Picture:
    """The picture whose file is ``content``, size and format read from its header.

    Raises:
        DataError: it is no JPEG, PNG, WEBP or BMP.
    """
    names = [format.name for format in PictureFormat if format]
    try:
        with warnings.catch_warnings():
            # Only the header is read; a large picture is not this function's business.
            warnings.simplefilter("ignore", PillowImage.DecompressionBombWarning)
            with PillowImage.open(io.BytesIO(content), formats=names) as opened:
                (width, height), name = opened.size, opened.format
    except (OSError, ValueError, SyntaxError, PillowImage.DecompressionBombError) as error:
        raise DataError(
            f"{len(content)} bytes are no picture that a story can hold; it takes "
            f"{', '.join(names)}"
        ) from error
    return Picture(width=width, height=height, format=PictureFormat[str(name)], image_data=content)


def _fill(message: Any, item: _Item) -> None:
    for entry in fields(item):
        value: Any = getattr(item, entry.name)
        if value is None:
            continue
        target: Any = getattr(message, entry.name)
        if isinstance(value, list):
            for element in cast(list[_Item], value):
                _fill(target.add(), element)
        elif isinstance(value, dict):
            for key, content in cast(dict[str, bytes | float], value).items():
                target[_utf8(key)] = content
        elif isinstance(value, tuple(_ITEMS.values())):
            target.SetInParent()
            _fill(target, value)
        else:
            setattr(message, entry.name, _utf8(value) if isinstance(value, str) else value)


def _item(message: Any) -> _Item:
    name: str = message.DESCRIPTOR.name
    values: dict[str, Any] = {}
    for field_name, (_, kind) in FIELDS[name].items():
        value: Any = getattr(message, field_name)
        if kind.startswith("map "):
            value = dict(value)
        elif kind.startswith("repeated "):
            value = [_item(element) for element in value]
        elif kind in FIELDS:
            value = _item(value) if message.HasField(field_name) else None
        elif kind == "ImageFormat":
            value = PictureFormat(value) if value in _FORMATS else PictureFormat.UNKNOWN
        values[field_name] = value
    return _ITEMS[name](**values)


def _utf8(text: str) -> str:
    return text.encode(errors="replace").decode()
