"""A line of task JSONL, checked field by field against :mod:`emu35.data.readers.task_table`."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from emu35.config.schema import did_you_mean
from emu35.data.readers.records import PictureData, Reason, is_readable
from emu35.data.readers.task_table import (
    ID,
    INSTRUCTION,
    TASK_FORMS,
    THOUGHT,
    TURNS,
    ExploreKind,
    Field,
    Holds,
    TaskForm,
)
from emu35.tokens.template import Task

_SHOWN = 60
"""Characters of a wrong value that a message shows."""


class WrongTask(Exception):
    """What is wrong with a task record, with rule and remedy; ``reason`` is how it is counted."""

    def __init__(self, detail: str, *, reason: Reason = Reason.bad_task) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A step of an answer: text, picture or both; ``thought`` belongs to the picture, and
    ``instruction`` is what asks for the step in an interactive exploration."""

    text: str | None = None
    thought: str | None = None
    image: PictureData | None = None
    instruction: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskTurn:
    """A question and its answer; ``thought`` is the global chain of thought of the answer.

    The pictures stand where the template puts them; with a ``mark`` they replace its places in the
    prompt instead, of which there are as many.
    """

    prompt: str
    images: tuple[PictureData, ...]
    thought: str | None
    steps: tuple[Step, ...]
    mark: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRecord:
    """A task record that is sound. ``id`` is its own, if it has one; ``kinds`` are empty for all
    tasks but explore."""

    task: Task
    id: str | None
    turns: tuple[TaskTurn, ...]
    kinds: tuple[ExploreKind, ...]


def read_task(record: Mapping[str, Any], *, folder: Path) -> TaskRecord:
    """The record of a line that has ``task``; relative picture paths start at ``folder``.

    Raises:
        WrongTask: naming the first value that is wrong, the rule, and what to do.
    """
    name = record["task"]
    known = [task.value for task in TASK_FORMS]
    if not isinstance(name, str) or name not in known:
        hint = did_you_mean(name, known) if isinstance(name, str) else ""
        raise WrongTask(
            f"task is {_show(name)}; it is one of {', '.join(known)}.{hint} Mend it, or rename the "
            "key if the line is no task record"
        )
    reader = _TaskReader(task=Task(name), folder=folder)
    return reader.read({key: value for key, value in record.items() if key != "task"})


@dataclass(frozen=True, kw_only=True, slots=True)
class _TaskReader:
    """Reads one record; ``where`` in its methods is a path such as ``turns[0].steps[1].``"""

    task: Task
    folder: Path

    @property
    def form(self) -> TaskForm:
        return TASK_FORMS[self.task]

    def read(self, fields: Mapping[str, Any]) -> TaskRecord:
        form = self.form
        pair = (*form.asked, *form.answered)
        beside = (ID, THOUGHT, *form.more)
        if form.several_turns and fields.get(TURNS.name) is not None:
            both = [field.name for field in pair if fields.get(field.name) is not None]
            if both:
                raise self._wrong(
                    f"{both[0]} stands beside turns; in a dialogue it belongs into a turn; move it"
                )
            values = self._values(fields, (*beside, TURNS), where="")
            turns = self._turns(values)
        else:
            values = self._values(fields, (*beside, *pair), where="")
            turns = (self._turn(values, where=""),)
        kinds = tuple(ExploreKind(kind) for kind in values.get("kinds") or ExploreKind)
        explored = kinds if self.task is Task.explore else ()
        if any(kind.interactive for kind in explored):
            self._check_instructions(turns[0].steps)
        return TaskRecord(task=self.task, id=values.get(ID.name), turns=turns, kinds=explored)

    def _turns(self, values: Mapping[str, Any]) -> tuple[TaskTurn, ...]:
        form = self.form
        turns: list[TaskTurn] = []
        for number, entry in enumerate(values[TURNS.name]):
            where = f"turns[{number}]."
            asked = [
                replace(field, required=False) if field.only_first and number else field
                for field in form.asked
            ]
            fields = (THOUGHT, *asked, *form.answered)
            found = self._values(self._object(entry, where=where), fields, where=where)
            if number == 0 and values.get(THOUGHT.name) is not None:
                if found.get(THOUGHT.name) is not None:
                    raise self._wrong(
                        "thought stands both beside turns and in turns[0], where it has one "
                        "place; leave one out"
                    )
                found[THOUGHT.name] = values[THOUGHT.name]
            turns.append(self._turn(found, where=where))
        return tuple(turns)

    def _turn(self, values: Mapping[str, Any], *, where: str) -> TaskTurn:
        images = next(
            (values.get(field.name) for field in self.form.asked if field.holds is Holds.pictures),
            None,
        )
        return TaskTurn(
            prompt=values["prompt"],
            images=tuple(images or ()),
            thought=values.get(THOUGHT.name),
            steps=self._steps(values, where=where),
        )

    def _steps(self, values: Mapping[str, Any], *, where: str) -> tuple[Step, ...]:
        if "answer" in values:
            return (Step(text=values["answer"]),)
        if "steps" not in values:
            return (Step(image=values["image"], thought=values.get("image_thought")),)
        steps: list[Step] = []
        for number, entry in enumerate(values["steps"]):
            at = f"{where}steps[{number}]."
            step = Step(**self._values(self._object(entry, where=at), self.form.step, where=at))
            if step.text is None and step.image is None:
                raise self._wrong(f"{at[:-1]} has neither text nor image; give it one of them")
            if step.thought is not None and step.image is None:
                raise self._wrong(
                    f"{at}thought is {_show(step.thought)} without an image; it is the chain of "
                    "thought of the step's picture; give the image, or make the thought text"
                )
            steps.append(step)
        return tuple(steps)

    def _check_instructions(self, steps: Sequence[Step]) -> None:
        for number, step in enumerate(steps[1:], start=1):
            if step.instruction is None:
                raise self._wrong(
                    f"steps[{number}].{INSTRUCTION.name} is missing; interactive kinds ask for "
                    "every step after the first by its instruction; give it, or leave interactive "
                    "kinds out with kinds"
                )

    def _values(
        self, given: Mapping[str, Any], fields: Sequence[Field], *, where: str
    ) -> dict[str, Any]:
        """The values of ``fields``, checked; those that are absent or null are left out. A null is
        never too much: tables written as JSON lines have one for each column of no value."""
        known = [field.name for field in fields]
        for key, value in given.items():
            if key not in known and value is not None:
                raise self._wrong(
                    f"{where}{_show(key)} is no field of the {self.task.value} task here; it has "
                    f"{', '.join(known)}.{did_you_mean(key, known)} Rename it or leave it out"
                )
        values: dict[str, Any] = {}
        for field in fields:
            value = given.get(field.name)
            if value is not None:
                values[field.name] = self._value(value, field=field, where=where + field.name)
            elif field.required:
                what = "null" if field.name in given else "missing"
                raise self._wrong(
                    f"{where}{field.name} is {what}; it must be {field.holds.value} "
                    f"({field.meaning}); give it"
                )
        return values

    def _value(self, value: Any, *, field: Field, where: str) -> Any:
        check: dict[Holds, Callable[[Any, Field, str], Any]] = {
            Holds.text: self._text,
            Holds.label: self._label,
            Holds.picture: self._picture,
        }
        if field.holds in check:
            return check[field.holds](value, field, where)
        if not isinstance(value, list):
            raise self._wrong(f"{where} is {_show(value)}, not {field.holds.value}; make it one")
        entries = cast(list[Any], value)
        if len(entries) < field.least or (field.most is not None and len(entries) > field.most):
            raise self._wrong(
                f"{where} has {len(entries)} entries; the {self.task.value} task has "
                f"{field.count}; add or remove some"
            )
        if field.holds is Holds.pictures:
            return [self._picture(v, field, f"{where}[{at}]") for at, v in enumerate(entries)]
        if field.holds is Holds.kinds:
            return self._kinds(entries, where=where)
        return entries

    def _text(self, value: Any, field: Field, where: str) -> str:
        if not isinstance(value, str):
            raise self._wrong(
                f"{where} is {_show(value)}, not {field.holds.value} ({field.meaning}); write it "
                "as a string"
            )
        if not value.strip():
            raise self._wrong(
                f"{where} is {_show(value)}, which is blank; it must be {field.holds.value} "
                f"({field.meaning}); write it, or leave the field out if it is optional"
            )
        return value

    def _label(self, value: Any, field: Field, where: str) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self._wrong(f"{where} is {_show(value)}, not {field.holds.value}; make it one")
        return str(value)

    def _picture(self, value: Any, field: Field, where: str) -> Path:
        if not isinstance(value, str) or not value:
            raise self._wrong(
                f"{where} is {_show(value)}, not the path of a picture; write the path as a string"
            )
        path = self.folder / value
        if not is_readable(path):
            raise WrongTask(
                f"{where} is {_show(value)}, and there is no such file; relative paths start at "
                f"the folder of the record's file, {self.folder}; mend the path or bring the file",
                reason=Reason.missing_file,
            )
        return path

    def _kinds(self, entries: list[Any], *, where: str) -> list[str]:
        known = [kind.value for kind in ExploreKind]
        for entry in entries:
            if entry not in known or entries.count(entry) > 1:
                what = "given twice" if entry in known else "unknown"
                raise self._wrong(
                    f"{where} has {_show(entry)}, which is {what}; it has some of "
                    f"{', '.join(known)}, each once; mend it"
                )
        return entries

    def _object(self, value: Any, *, where: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(f"{where[:-1]} is {_show(value)}, not an object; write it in {{}}")
        return cast(dict[str, Any], value)

    def _wrong(self, detail: str) -> WrongTask:
        return WrongTask(f"{detail}; `emu35 data tasks {self.task.value}` shows the schema")


_REPR = reprlib.Repr()
"""Shows any JSON value in one short piece, however long or deep it is."""
_REPR.maxstring = _SHOWN


def _show(value: Any) -> str:
    return "null" if value is None else _REPR.repr(value)
