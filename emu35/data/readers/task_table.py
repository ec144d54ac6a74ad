"""The tasks of fine-tuning (paper section 4.1) as one table: fields, counts and examples.

The reader validates by this table, messages of rejects are made of it, and ``emu35 data tasks`` and
the lines below print it, so that they cannot drift apart.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from emu35.tokens.template import Task


class Holds(StrEnum):
    """What a field of a record holds, in the words of the messages."""

    text = "a text that is not blank"
    label = "a text or a whole number"
    picture = "the path of a picture"
    pictures = "a list of paths of pictures"
    steps = "a list of steps"
    kinds = "a list of different kinds"
    turns = "a list of turns"


class ExploreKind(StrEnum):
    """What a world exploration is made into: the first picture drawn or given, and each step asked
    for or all of them told in one answer (paper section 4.1.2)."""

    text_interactive = "text_interactive"
    image_interactive = "image_interactive"
    text_free = "text_free"
    image_free = "image_free"

    @property
    def from_image(self) -> bool:
        """Whether the first step's picture is given with the question."""
        return self in (ExploreKind.image_interactive, ExploreKind.image_free)

    @property
    def interactive(self) -> bool:
        """Whether every step answers an instruction of its own."""
        return self in (ExploreKind.text_interactive, ExploreKind.image_interactive)


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """A key of a record. ``least`` and ``most`` count the entries of a list; ``most`` None: any
    number. ``only_first``: required, but not in a turn that follows another."""

    name: str
    holds: Holds
    meaning: str
    required: bool = True
    only_first: bool = False
    least: int = 0
    most: int | None = None

    @property
    def count(self) -> str:
        """How many entries a list may have, in words."""
        if self.most is None:
            return f"{self.least} or more" if self.least else "any number"
        return f"{self.least} to {self.most}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskForm:
    """What a record of one task looks like.

    ``asked`` are the fields of the question and ``answered`` those of the answer; a record with
    ``turns`` (where ``several_turns``) has both in every turn instead. ``step`` are the fields of
    a step, ``more`` those that stand beside questions and answers.
    """

    meaning: str
    asked: tuple[Field, ...]
    answered: tuple[Field, ...]
    step: tuple[Field, ...] = ()
    more: tuple[Field, ...] = ()
    several_turns: bool = True
    example: Mapping[str, Any]


_PROMPT = Field(name="prompt", holds=Holds.text, meaning="what the user asks")
_REFERENCES = Field(
    name="references", holds=Holds.pictures, meaning="reference pictures", required=False
)
_IMAGE = Field(name="image", holds=Holds.picture, meaning="the picture that answers")
_IMAGE_THOUGHT = Field(
    name="image_thought",
    holds=Holds.text,
    meaning="chain of thought of the picture",
    required=False,
)

ID = Field(
    name="id", holds=Holds.label, meaning="joins the line's number in reports", required=False
)
THOUGHT = Field(
    name="thought",
    holds=Holds.text,
    meaning="global chain of thought, before the answer",
    required=False,
)
TURNS = Field(
    name="turns",
    holds=Holds.turns,
    meaning="a dialogue",
    required=False,
    least=1,
)
"""Fields of every record."""

_STEP_THOUGHT = Field(
    name="thought",
    holds=Holds.text,
    meaning="chain of thought of the step's picture",
    required=False,
)
_STEP = (
    Field(name="text", holds=Holds.text, meaning="what the step says", required=False),
    _STEP_THOUGHT,
    Field(name="image", holds=Holds.picture, meaning="what the step shows", required=False),
)
INSTRUCTION = Field(
    name="instruction",
    holds=Holds.text,
    meaning="what asks for the step; interactive kinds need it, except in the first step, where "
    "no kind uses it",
    required=False,
)


def _steps(*, least: int, most: int | None = None) -> Field:
    return Field(
        name="steps", holds=Holds.steps, meaning="the answer, in order", least=least, most=most
    )


TASK_FORMS: Mapping[Task, TaskForm] = MappingProxyType(
    {
        Task.chat: TaskForm(
            meaning="language; visual question answering where there are images",
            asked=(
                _PROMPT,
                Field(
                    name="images",
                    holds=Holds.pictures,
                    meaning="what the question is about",
                    required=False,
                ),
            ),
            answered=(Field(name="answer", holds=Holds.text, meaning="the answer"),),
            example={
                "prompt": "What is on the table?",
                "images": ["a.jpg"],
                "answer": "A red cup.",
            },
        ),
        Task.t2i: TaskForm(
            meaning="text to image",
            asked=(_PROMPT,),
            answered=(_IMAGE, _IMAGE_THOUGHT),
            example={"prompt": "A red cup on a table.", "image": "a.jpg"},
        ),
        Task.x2i: TaskForm(
            meaning="any to image: editing, subjects, composition",
            asked=(
                _PROMPT,
                Field(
                    name="references",
                    holds=Holds.pictures,
                    meaning="reference pictures, before the prompt; optional in later turns",
                    only_first=True,
                ),
            ),
            answered=(_IMAGE, _IMAGE_THOUGHT),
            example={"prompt": "Make the cup blue.", "references": ["a.jpg"], "image": "b.jpg"},
        ),
        Task.story: TaskForm(
            meaning="visual narrative",
            asked=(_PROMPT, _REFERENCES),
            answered=(_steps(least=1),),
            step=_STEP,
            example={
                "prompt": "Tell of a lost cup.",
                "thought": "Lost, then found.",
                "steps": [
                    {"text": "A cup was lost.", "thought": "An empty table.", "image": "a.jpg"},
                    {"text": "It was found.", "image": "b.jpg"},
                ],
            },
        ),
        Task.howto: TaskForm(
            meaning="visual guidance, step by step",
            asked=(_PROMPT, _REFERENCES),
            answered=(_steps(least=2, most=10),),
            step=_STEP,
            example={
                "prompt": "How do I paint this cup?",
                "references": ["a.jpg"],
                "steps": [{"text": "Clean it."}, {"text": "Paint it.", "image": "b.jpg"}],
            },
        ),
        Task.explore: TaskForm(
            meaning="world exploration; a record becomes a document of each kind, and its global "
            "thought is left out of the interactive ones",
            asked=(_PROMPT,),
            answered=(_steps(least=2),),
            step=(
                INSTRUCTION,
                Field(name="text", holds=Holds.text, meaning="what is told", required=False),
                _STEP_THOUGHT,
                Field(name="image", holds=Holds.picture, meaning="the view"),
            ),
            more=(
                Field(
                    name="kinds",
                    holds=Holds.kinds,
                    meaning=f"which of {', '.join(ExploreKind)} (default: all)",
                    required=False,
                    least=1,
                ),
            ),
            several_turns=False,
            example={
                "prompt": "Walk through an old town.",
                "steps": [
                    {"text": "A gate.", "image": "a.jpg"},
                    {"instruction": "Walk in.", "text": "A square.", "image": "b.jpg"},
                ],
            },
        ),
        Task.vla: TaskForm(
            meaning="embodied manipulation: subtasks and their keyframes",
            asked=(
                _PROMPT,
                Field(
                    name="references",
                    holds=Holds.pictures,
                    meaning="what the robot sees at the start",
                    least=1,
                ),
            ),
            answered=(_steps(least=1),),
            step=(
                Field(name="text", holds=Holds.text, meaning="instruction of the subtask"),
                _STEP_THOUGHT,
                Field(name="image", holds=Holds.picture, meaning="keyframe of its end"),
            ),
            several_turns=False,
            example={
                "prompt": "Clear the table.",
                "references": ["a.jpg"],
                "steps": [
                    {"text": "Grasp the cup.", "image": "b.jpg"},
                    {"text": "Lift the cup.", "image": "c.jpg"},
                ],
            },
        ),
    }
)
"""Every task that a record may name."""


def describe_task(task: Task) -> Iterator[str]:
    """Lines that tell how a record of ``task`` is written, with an example."""
    form = TASK_FORMS[task]
    yield f"{task.value}: {form.meaning}"
    pair = (*form.asked, *form.answered)
    yield from (f"  {_row(field)}" for field in (ID, THOUGHT, *pair, *form.more))
    if form.several_turns:
        names = ", ".join(field.name for field in pair)
        yield f"  {_row(TURNS)} in place of {names}, which every turn has; it may have a thought"
    if form.step:
        yield "  a step has"
        yield from (f"    {_row(field)}" for field in form.step)
    yield f"  {json.dumps({'task': task.value, **form.example})}"


def _row(field: Field) -> str:
    name = field.name if field.required else f"[{field.name}]"
    is_list = field.holds in (Holds.pictures, Holds.steps, Holds.kinds, Holds.turns)
    count = f" ({field.count})" if is_list else ""
    return f"{name:<16}{field.holds.value}{count}: {field.meaning}"


def describe_tasks() -> Iterator[str]:
    """Lines about the records of all tasks."""
    yield from _GENERAL
    for task in TASK_FORMS:
        yield ""
        yield from describe_task(task)


_GENERAL = (
    "A record is a JSON object on a line of its own, with a key 'task'. Fields in [brackets] may",
    "be left out or null; other keys are refused. Relative paths start at the folder of the file.",
    "A step has a text, a picture or both; its thought is that of its picture, right before it.",
)

__doc__ = "\n".join([__doc__ or "", *describe_tasks()])
