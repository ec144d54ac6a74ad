"""Documents of fine-tuning from task records.

A document is a dialogue in the form of :mod:`emu35.tokens.template`, each answer in the form that
:mod:`emu35.tokens.answer` reads::

    BOS {opening} USER: {question}{images} ASSISTANT: BSS {answer} ESS
        ( USER: {question}{images} ASSISTANT: BSS {answer} ESS)* EOS
    answer = [BOG thought EOG] (text? [BOC thought EOC] image?)*

Texts of two steps with no picture between them are parted by an empty line, since nothing else
would show where a step ends. World explorations and embodied manipulations become several
documents, see :func:`task_documents`. A global thought is left out of those whose first answer is
not all that it plans.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import StrEnum

from emu35.data.readers.records import PictureData, RawImage, RawPart, RawSpecial, RawText
from emu35.data.readers.task_records import Step, TaskRecord, TaskTurn
from emu35.data.readers.task_table import ExploreKind
from emu35.tokens.answer import BOC, BOG, EOC, EOG, ESS
from emu35.tokens.document import Special, Text
from emu35.tokens.template import Task, question_parts

_BETWEEN = "\n\n"
_THEN = "\n"
"""What stands between the prompt of an exploration and its first instruction."""


class Starts(StrEnum):
    """Where documents of a manipulation begin besides its first step: nowhere (``first``), at one
    later step drawn for each record (``random``), or at every later step (``all``)."""

    first = "first"
    random = "random"
    all = "all"


def task_documents(record: TaskRecord, *, id: str, starts: Starts) -> dict[str, list[RawPart]]:
    """What is put behind the record's id -> the parts of that document. ``id`` serves for drawing
    where the record has none of its own.

    One document, with nothing behind its id, except for:

    * world exploration: a document of each kind (``#text_free`` and so on). The kinds from an image
      show the first step's picture with the question and answer from the second step on. The free
      kinds answer with all steps at once. In the interactive kinds every step is a turn, asked for
      by its instruction; the first turn is asked by the record's prompt, and from an image by the
      prompt, a line break and the instruction. A global chain of thought plans the whole walk, so
      it stays with the free kinds: in an interactive one it would tell what is yet to be asked.
    * embodied manipulation: the whole, and by ``starts`` those that begin at a later step
      (``#from_step_2``) with the keyframe of the step before in place of the references. A global
      chain of thought, which plans from the beginning, stays with the whole.
    """
    if record.task is Task.explore:
        (whole,) = record.turns
        return {
            f"#{kind.value}": _dialogue(Task.explore, _explored(whole, kind=kind))
            for kind in record.kinds
        }
    documents = {"": _dialogue(record.task, record.turns)}
    if record.task is Task.vla:
        (whole,) = record.turns
        for first in _later_starts(len(whole.steps), id=record.id or id, starts=starts):
            turn = replace(
                whole,
                images=_picture_of(whole.steps[first - 1]),
                steps=whole.steps[first:],
                thought=None,
            )
            documents[f"#from_step_{first + 1}"] = _dialogue(Task.vla, [turn])
    return documents


def _later_starts(steps: int, *, id: str, starts: Starts) -> Sequence[int]:
    """Numbers of the steps, counted from 0, that documents begin at besides the first."""
    if starts is Starts.first or steps < 2:
        return []
    if starts is Starts.all:
        return range(1, steps)
    # Drawn from the id alone, so that ingesting again gives the same documents.
    draw = hashlib.sha256(id.encode(errors="surrogatepass")).digest()[:8]
    return [1 + int.from_bytes(draw) % (steps - 1)]


def _explored(whole: TaskTurn, *, kind: ExploreKind) -> Sequence[TaskTurn]:
    first, *rest = whole.steps
    if kind.from_image:
        whole = replace(whole, images=_picture_of(first), steps=tuple(rest))
    if not kind.interactive:
        return [whole]
    head, *later = whole.steps
    prompt = f"{whole.prompt}{_THEN}{head.instruction}" if kind.from_image else whole.prompt
    return [
        replace(whole, prompt=prompt, steps=(head,), thought=None),
        *(
            TaskTurn(prompt=step.instruction or "", images=(), thought=None, steps=(step,))
            for step in later
        ),
    ]


def _picture_of(step: Step) -> tuple[PictureData, ...]:
    return () if step.image is None else (step.image,)


def _dialogue(task: Task, turns: Sequence[TaskTurn]) -> list[RawPart]:
    parts: list[RawPart] = []
    for number, turn in enumerate(turns):
        images = [RawImage(picture) for picture in turn.images]
        placed = [] if turn.mark else images
        for part in question_parts(task, turn.prompt, images=placed, later=number > 0):
            if isinstance(part, Text):
                parts += _with_pictures(part.text, mark=turn.mark, images=images)
            else:
                parts.append(RawSpecial(part.token) if isinstance(part, Special) else part)
        parts += [*_answer(turn), RawSpecial(ESS)]
    return parts


def _with_pictures(text: str, *, mark: str, images: Sequence[RawImage]) -> Iterator[RawPart]:
    """``text`` with a picture in the place of each ``mark``; all of it as text without one."""
    if not mark or mark not in text:
        yield RawText(text)
        return
    before, *rest = text.split(mark)
    if before:
        yield RawText(before)
    for image, after in zip(images, rest, strict=True):
        yield image
        if after:
            yield RawText(after)


def _answer(turn: TaskTurn) -> Iterator[RawPart]:
    if turn.thought is not None:
        yield from (RawSpecial(BOG), RawText(turn.thought), RawSpecial(EOG))
    told = False
    for step in turn.steps:
        if step.text is not None:
            yield RawText(f"{_BETWEEN}{step.text}" if told else step.text)
        if step.thought is not None:
            yield from (RawSpecial(BOC), RawText(step.thought), RawSpecial(EOC))
        if step.image is not None:
            yield RawImage(step.image)
        told = step.image is None
