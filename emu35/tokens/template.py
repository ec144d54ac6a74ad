"""Prompts of the release, and the numbers that go with each task.

The official prompt is one string that is tokenized with specials parsed. Here the user's question
is encoded as plain text and only the template places specials, so the ids are equal for every
question that spells no special token, and a question that spells one cannot break out of it.

A dialogue goes on where its last answer ended::

    BOS {opening} USER: {question}{images} ASSISTANT: BSS {answer} ESS
        USER: {question}{images} ASSISTANT: BSS ...

The release publishes no form of several turns. This one is inferred: ESS is how an answer ends in
training, and a turn is asked as the first one was. In the unconditional stream every turn keeps its
place and its pictures, asked and answered, and loses its words.

What is asked is spelled in one place, :func:`question_parts`. Inference fills it with codes and
ingestion of training documents with pictures that are not encoded yet, so that a model is trained
on the very prompts that it is asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from emu35.tokens.answer import BSS
from emu35.tokens.document import Image, Special, Text
from emu35.tokens.serialize import join_parts
from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary

Picture = TypeVar("Picture")
"""Whatever stands for a picture: a grid of codes, or a file that is still to be encoded."""


class Task(StrEnum):
    """What the release was tuned for; the name stands in the prompt."""

    t2i = "t2i"
    """Text to image."""
    x2i = "x2i"
    """Text and reference images to image (the release was shown up to three)."""
    howto = "howto"
    """Step by step guidance in text and images."""
    story = "story"
    """Illustrated story."""
    explore = "explore"
    """Exploring a world, step by step."""
    vla = "vla"
    """Embodied manipulation."""
    chat = "chat"
    """Text, or a question about images, to text: the general prompt, which names no task."""


class PromptTemplate(StrEnum):
    """``official``: the chat form of the release. ``plain``: BOS and the question, the form of
    pretraining documents, for models that saw no fine-tuning."""

    official = "official"
    plain = "plain"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Turn:
    """An earlier turn of a dialogue: what was asked, with reference ``images`` [H, W] codes, and
    the ids that came. ESS and EOS at their end are dropped, and so is an image that was cut off."""

    question: str
    answer: tuple[int, ...]
    images: tuple[NDArray[np.integer], ...] = ()


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
    ``image_area`` is in pixels. ``one_image`` tasks are done when their image is; tasks without
    ``images`` answer in text alone.
    """

    guidance: float
    guidance_image: float
    max_new_tokens: int
    image_area: int
    text: Sampling
    image: Sampling
    one_image: bool
    images: bool = True


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
        Task.chat: TaskNumbers(
            guidance=1.0,
            guidance_image=1.0,
            max_new_tokens=2048,
            image_area=518_400,
            text=Sampling(top_k=1024, top_p=0.9, temperature=1.0),
            image=Sampling(top_k=10240, top_p=1.0, temperature=1.0),
            one_image=False,
            images=False,
        ),
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
_CLOSING = " ASSISTANT: "
_NEXT = " USER: "


def question_parts(
    task: Task,
    question: str,
    *,
    images: Sequence[Picture] = (),
    later: bool = False,
    template: PromptTemplate = PromptTemplate.official,
) -> list[Text | Special | Picture]:
    """What is asked in one turn, in order: text and ``images``, and BSS where the template has it.

    Images follow each other without a separator, before the question for ``x2i`` and after it for
    every other task. A turn that is not the first (``later``) opens with ``USER:`` alone. BOS and
    the ESS of an earlier answer, which stand before it, are no part of it.
    """
    if template is PromptTemplate.plain:
        opening = closing = ""
        end: list[Text | Special | Picture] = []
    else:
        opening, closing = _NEXT if later else _opening(task), _CLOSING
        end = [Special(BSS)]
    before, after = (opening, question) if task is Task.x2i else (opening + question, "")
    return [Text(before), *images, Text(after + closing), *end]


def build_prompt(
    task: Task,
    question: str,
    *,
    images: Sequence[Image | NDArray[np.integer]] = (),
    earlier: Sequence[Turn] = (),
    tokenizer: TextTokenizer,
    template: PromptTemplate = PromptTemplate.official,
) -> Prompt:
    """Conditional and unconditional ids for ``question`` with reference ``images`` [H, W] codes.

    The unconditional prompt names no task, keeps the images and drops the question (see
    :func:`question_parts` for their order). ``earlier`` turns come first (see the module); the
    plain template, which knows no turns, puts questions and answers one after the other, as one
    document.

    Raises:
        DataError: if an image's codes do not fit the codebook.
        TokenizerError: if an id of an earlier answer lies outside the vocabulary.
    """
    vocabulary = tokenizer.vocabulary
    end = [] if template is PromptTemplate.plain else [vocabulary.ess]
    conditional, unconditional = [vocabulary.bos], [vocabulary.bos]

    def ask(question: str, images: Sequence[Image | NDArray[np.integer]], *, later: bool) -> None:
        shown = [image if isinstance(image, Image) else Image(image) for image in images]
        for stream, asked, words in (
            (conditional, task, question),
            # The general prompt, which names no task, is that of chat.
            (unconditional, Task.chat, ""),
        ):
            parts = question_parts(asked, words, images=shown, later=later, template=template)
            stream += join_parts(parts, tokenizer)

    for number, turn in enumerate(earlier):
        ask(turn.question, turn.images, later=number > 0)
        answer = answer_ids(turn.answer, vocabulary=vocabulary)
        conditional += [*answer, *end]
        unconditional += [*image_ids(answer, vocabulary=vocabulary), *end]
    ask(question, images, later=bool(earlier))
    return Prompt(conditional=conditional, unconditional=unconditional)


def answer_ids(ids: Sequence[int], *, vocabulary: Vocabulary) -> list[int]:
    """``ids`` of an answer without the ESS and EOS that end it, and without an image at their end
    that was cut off: what a later turn builds on.

    Raises:
        TokenizerError: if an id lies outside the vocabulary.
    """
    for id in ids:
        vocabulary.check(id)
    end = len(ids)
    while end and ids[end - 1] in (vocabulary.ess, vocabulary.eos):
        end -= 1
    kept = list(ids[:end])
    layout = [at for at, id in enumerate(kept) if id in (vocabulary.boi, vocabulary.eoi)]
    if layout and kept[layout[-1]] == vocabulary.boi:
        del kept[layout[-1] :]
    return kept


def image_ids(ids: Sequence[int], *, vocabulary: Vocabulary) -> list[int]:
    """The images among ``ids``, each from BOI to EOI."""
    kept: list[int] = []
    begin: int | None = None
    for at, id in enumerate(ids):
        if id == vocabulary.boi:
            begin = at
        elif id == vocabulary.eoi and begin is not None:
            kept += ids[begin : at + 1]
            begin = None
    return kept


def _opening(task: Task) -> str:
    """What stands before the first question."""
    if task is Task.chat:
        return "You are a helpful assistant. USER: "
    extra = _HOWTO if task is Task.howto else ""
    return f"You are a helpful assistant for {task.value} task.{extra} USER: "
