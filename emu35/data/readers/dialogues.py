"""Published records of fine-tuning that are no task records, read as if they were.

A conversation of LLaVA (arXiv 2304.08485) becomes a ``chat``::

    {"id": "...", "image": "path" (or a list of them, or left out), "conversations":
        [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cup."}]}

``<image>`` stands for the next picture. At the beginning or the end of a question the pictures go
where the prompt of inference has them, after the question; between words they stay in place. A
record of pictures without any ``<image>`` shows them with the first question.

An edit becomes an ``x2i``: source pictures, instruction, target. The names of InstructPix2Pix
(arXiv 2211.09800), MagicBrush (arXiv 2306.10012), UltraEdit and OmniEdit are known, too (see
``SOURCES``, ``INSTRUCTIONS``, ``TARGETS``). Masks and captions beside them are left unread.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from emu35.data.readers.named_pictures import WrongPicture, named_picture
from emu35.data.readers.records import PictureData, Reason
from emu35.data.readers.task_records import Step, TaskRecord, TaskTurn
from emu35.tokens.template import Task

CONVERSATIONS = "conversations"
SOURCES = (
    "source",
    "sources",
    "images",
    "input_image",
    "input_images",
    "original_image",
    "source_img",
    "source_image",
    "src_img",
)
INSTRUCTIONS = ("instruction", "edit_prompt", "edit_instruction", "edited_prompt_list")
TARGETS = (
    "target",
    "target_img",
    "target_image",
    "edited_image",
    "edited_img",
    "output_image",
)
_MARK = "<image>"
_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant", "model")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")


class WrongDialogue(Exception):
    """What is wrong with a record, with rule and remedy; ``reason`` is how it is counted."""

    def __init__(self, detail: str, *, reason: Reason) -> None:
        super().__init__(detail)
        self.reason = reason


def read_conversation(row: Mapping[str, Any], *, folder: Path) -> TaskRecord:
    """The chat of a record with ``conversations``.

    Raises:
        WrongDialogue: naming what is wrong, the rule, and what to do.
        NoPicture: if a picture is not there.
    """
    media = next((key for key in _OTHER_MEDIA if row.get(key)), None)
    if media is not None:
        raise _wrong(f"it has a {media!r}; conversations hold text and pictures; leave it out")
    images = _pictures(row, keys=("image", "images"), folder=folder, wrong=_wrong)
    said = _said(row[CONVERSATIONS])
    marks = [question.count(_MARK) for question, _ in said]
    if images and not any(marks):
        marks[0] = len(images)
    if sum(marks) != len(images):
        raise _wrong(
            f"its questions have {sum(marks)} places {_MARK} and it names {len(images)} pictures; "
            "there must be as many"
        )
    turns: list[TaskTurn] = []
    for (question, answer), count in zip(said, marks, strict=True):
        own, images = images[:count], images[count:]
        turns.append(_turn(question, answer=answer, images=own, number=len(turns)))
    return TaskRecord(task=Task.chat, id=None, turns=tuple(turns), kinds=())


def _turn(question: str, *, answer: str, images: Sequence[PictureData], number: int) -> TaskTurn:
    """Raises: WrongDialogue."""
    bare = question.strip()
    # Pictures at either end go where the template has them; those between words stay.
    while bare.startswith(_MARK):
        bare = bare.removeprefix(_MARK).lstrip()
    while bare.endswith(_MARK):
        bare = bare.removesuffix(_MARK).rstrip()
    inside = _MARK in bare
    prompt = question.strip() if inside else bare
    if not answer.strip() or not (prompt or images):
        raise _wrong(f"turn {number} is blank; every question and answer says something")
    steps = (Step(text=answer.strip()),)
    mark = _MARK if inside else ""
    return TaskTurn(prompt=prompt, images=tuple(images), thought=None, steps=steps, mark=mark)


def _said(value: Any) -> list[tuple[str, str]]:
    """Question and answer of each turn. Raises: WrongDialogue."""
    entries = cast(list[Any], value) if isinstance(value, list) else []
    if not entries or len(entries) % 2:
        raise _wrong(
            f"it has {len(entries)} messages; questions and answers must alternate, and a "
            "question at the end has no answer"
        )
    texts: list[str] = []
    for number, entry in enumerate(entries):
        message = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
        speaker, text = message.get("from"), message.get("value")
        expected = _MODEL if number % 2 else _HUMAN
        if speaker not in expected or not isinstance(text, str):
            raise _wrong(
                f"message {number} is from {speaker!r}; it must be a text from {expected[0]!r}, "
                "since questions and answers alternate (a system prompt is fixed by the template)"
            )
        if number % 2 and _MARK in text:
            raise _wrong(
                f"message {number}, an answer, holds {_MARK}; answers with pictures are records "
                "of the task story or howto"
            )
        texts.append(text)
    return list(zip(texts[::2], texts[1::2], strict=True))


def is_edit(row: Mapping[str, Any]) -> bool:
    """Whether it has an instruction and a target."""
    return _key(row, INSTRUCTIONS) is not None and _key(row, TARGETS) is not None


def read_edit(row: Mapping[str, Any], *, folder: Path) -> TaskRecord:
    """The edit of a record for which :func:`is_edit` holds.

    Raises:
        WrongDialogue: naming what is wrong, the rule, and what to do.
        NoPicture: if a picture is not there.
    """
    sources = _pictures(row, keys=SOURCES, folder=folder, wrong=_wrong_edit)
    targets = _pictures(row, keys=TARGETS, folder=folder, wrong=_wrong_edit)
    if not sources or len(targets) != 1:
        raise _wrong_edit(
            f"it has {len(sources)} source pictures and {len(targets)} targets; an edit has at "
            f"least one source (one of {', '.join(SOURCES)}) and one target"
        )
    words: Any = row[_key(row, INSTRUCTIONS) or ""]
    # OmniEdit has several wordings of one instruction, the first of which is the plain one.
    wordings = cast(list[Any], words) if isinstance(words, list) else [words]
    found: Any = wordings[0] if wordings else ""
    if not isinstance(found, str) or not found.strip():
        raise _wrong_edit("its instruction is no text, or blank; write what is to be changed")
    turn = TaskTurn(
        prompt=found.strip(),
        images=tuple(sources),
        thought=None,
        steps=(Step(image=targets[0]),),
    )
    return TaskRecord(task=Task.x2i, id=None, turns=(turn,), kinds=())


def _key(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if row.get(key) is not None), None)


def _pictures(
    row: Mapping[str, Any], *, keys: Sequence[str], folder: Path, wrong: Any
) -> list[PictureData]:
    """The picture, or the list of them, under the first of ``keys`` that is there."""
    key = _key(row, keys)
    if key is None:
        return []
    values = cast(list[Any], row[key]) if isinstance(row[key], list) else [row[key]]
    try:
        return [
            named_picture(value, folder=folder, where=f"{key}[{number}]")
            for number, value in enumerate(values)
        ]
    except WrongPicture as error:
        raise wrong(str(error)) from error


def _wrong(detail: str) -> WrongDialogue:
    return WrongDialogue(detail, reason=Reason.bad_conversation)


def _wrong_edit(detail: str) -> WrongDialogue:
    return WrongDialogue(detail, reason=Reason.bad_edit)
