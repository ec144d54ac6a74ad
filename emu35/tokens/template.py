"""Prompts of the release, and the numbers that go with each task.

The official prompt is one string that is tokenized with specials parsed. Here the user's question
is encoded as plain text and only the template places specials, so the ids are equal for every
question that spells no special token, and a question that spells one cannot break out of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from emu35.tokens.document import Image
from emu35.tokens.serialize import image_tokens
from emu35.tokens.text import TextTokenizer


class Task(StrEnum):
    """What the release was tuned for; the name stands in the prompt."""

    t2i = "t2i"
    """Text to image."""
    x2i = "x2i"
    """Text and up to three reference images to image."""
    howto = "howto"
    """Step by step guidance in text and images."""
    story = "story"
    """Illustrated story."""
    explore = "explore"
    """Exploring a world, step by step."""
    vla = "vla"
    """Embodied manipulation."""


class PromptTemplate(StrEnum):
    """``official``: the chat form of the release. ``plain``: BOS and the question, the form of
    pretraining documents, for models that saw no fine-tuning."""

    official = "official"
    plain = "plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Ids of the prompt, and of the stream that guidance steers away from."""

    conditional: list[int]
    unconditional: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Temperature, then top-k, then top-p."""

    top_k: int
    top_p: float
    temperature: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskNumbers:
    """What the official configurations recommend for a task.

    ``guidance`` is for the Emu3.5 model and ``guidance_image`` for its image-tuned sibling;
    ``image_area`` is in pixels. ``one_image`` tasks are done when their image is.
    """

    guidance: float
    guidance_image: float
    max_new_tokens: int
    image_area: int
    text: Sampling
    image: Sampling
    one_image: bool


def _one_image(*, guidance_image: float) -> TaskNumbers:
    return TaskNumbers(
        guidance=2.0,
        guidance_image=guidance_image,
        max_new_tokens=5120,
        image_area=1_048_576,
        text=Sampling(top_k=1024, top_p=0.9, temperature=1.0),
        image=Sampling(top_k=5120, top_p=1.0, temperature=1.0),
        one_image=True,
    )


def _interleaved(*, text: Sampling, image_top_k: int = 10240) -> TaskNumbers:
    return TaskNumbers(
        guidance=3.0,
        guidance_image=3.0,
        max_new_tokens=32768,
        image_area=518_400,
        text=text,
        image=Sampling(top_k=image_top_k, top_p=1.0, temperature=1.0),
        one_image=False,
    )


TASKS: Mapping[Task, TaskNumbers] = MappingProxyType(
    {
        Task.t2i: _one_image(guidance_image=5.0),
        Task.x2i: _one_image(guidance_image=3.0),
        Task.howto: _interleaved(text=Sampling(top_k=200, top_p=0.8, temperature=0.7)),
        Task.story: _interleaved(text=Sampling(top_k=1024, top_p=0.9, temperature=1.0)),
        Task.explore: _interleaved(
            text=Sampling(top_k=200, top_p=0.5, temperature=0.7), image_top_k=5120
        ),
        Task.vla: _interleaved(text=Sampling(top_k=1024, top_p=0.9, temperature=1.0)),
    }
)

ASPECT_RATIOS: Mapping[str, tuple[int, int] | None] = MappingProxyType(
    {
        "4:3": (55, 73),
        "21:9": (41, 97),
        "16:9": (47, 85),
        "3:2": (52, 78),
        "1:1": (64, 64),
        "3:4": (73, 55),
        "9:16": (85, 47),
        "2:3": (78, 52),
        "default": (55, 73),
        "auto": None,
    }
)
"""Width to height -> (height, width) in codes at one megapixel; ``auto``: the model decides."""

_HOWTO = " Please generate a response with interleaved text and images."


def build_prompt(
    task: Task,
    question: str,
    *,
    images: Sequence[Image | NDArray[np.integer]] = (),
    tokenizer: TextTokenizer,
    template: PromptTemplate = PromptTemplate.official,
) -> Prompt:
    """Conditional and unconditional ids for ``question`` with reference ``images`` [H, W] codes.

    Images follow each other without a separator, before the question for ``x2i`` and after it for
    every other task; the unconditional prompt keeps them and drops the question.

    Raises:
        DataError: if an image's codes do not fit the codebook.
    """
    vocabulary = tokenizer.vocabulary
    grids = [image.codes_HW if isinstance(image, Image) else image for image in images]
    pictures = [id for codes_HW in grids for id in image_tokens(codes_HW, tokenizer)]

    def written(before: str, after: str) -> list[int]:
        # Without a picture the two texts are one: byte pairs merge across the seam.
        if not pictures:
            return tokenizer.encode(before + after)
        return [*tokenizer.encode(before), *pictures, *tokenizer.encode(after)]

    if template is PromptTemplate.plain:
        asked = written("", question) if task is Task.x2i else written(question, "")
        return Prompt(
            conditional=[vocabulary.bos, *asked], unconditional=[vocabulary.bos, *pictures]
        )
    extra = _HOWTO if task is Task.howto else ""
    opening = f"You are a helpful assistant for {task.value} task.{extra} USER: "
    closing = " ASSISTANT: "
    if task is Task.x2i:
        asked = written(opening, question + closing)
    else:
        asked = written(opening + question, closing)
    unasked = written("You are a helpful assistant. USER: ", closing)
    return Prompt(
        conditional=[vocabulary.bos, *asked, vocabulary.bss],
        unconditional=[vocabulary.bos, *unasked, vocabulary.bss],
    )
