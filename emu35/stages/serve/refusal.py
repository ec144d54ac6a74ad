"""What a client is told when it does not get what it asked for: OpenAI's error shape.

``{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}``, where the message names the
value, the rule it breaks and the remedy.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

INVALID = "invalid_request_error"
SERVER = "server_error"

_LONGEST_VALUE = 80
"""Characters of a wrong value that a message repeats."""

_MOST_PROBLEMS = 8
"""Problems that one message lists; a body of 10,000 wrong parts needs no 10,000 lines."""


class Refusal(Exception):
    """An answer other than 200. ``param`` is the field at fault, ``code`` a stable word."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def plain(self) -> dict[str, Any]:
        """The body of the answer."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid_body(error: ValidationError, *, model: type[BaseModel]) -> Refusal:
    """The refusal of a body that does not have the form of ``model``; all problems in one."""
    found = error.errors(include_url=False, include_context=False)
    lines = [_sentence(problem, model=model) for problem in found[:_MOST_PROBLEMS]]
    if len(found) > _MOST_PROBLEMS:
        lines.append(f"and {len(found) - _MOST_PROBLEMS} more problems")
    place = _place(_located(found[0]["loc"], model=model)[0])
    return Refusal("; ".join(lines), param=place or None, code=found[0]["type"])


def _sentence(problem: Any, *, model: type[BaseModel]) -> str:
    steps, forms = _located(problem["loc"], model=model)
    place = _place(steps)
    if problem["type"] == "extra_forbidden":
        fields = [field for form in forms for field in form.model_fields]
        close = difflib.get_close_matches(str(steps[-1]), fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "leave it out"
        return f"unknown field {place!r}; {hint}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{place} is missing; give it"
    if problem["type"] == "value_error":
        return f"{place}: {message}" if place else message
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}"
    return f"{place}={shown(problem['input'])}: {message[:1].lower()}{message[1:]}"


def _located(
    loc: Sequence[str | int], *, model: type[BaseModel]
) -> tuple[list[str | int], list[type[BaseModel]]]:
    """The steps to a problem without those that only name a form, as ``image_url`` behind
    ``content[0]`` does; and the forms (mostly one) that the last step is a field of."""
    steps: list[str | int] = []
    forms = inside = [model]
    for step in loc:
        if isinstance(step, int):
            steps.append(step)
        elif len(inside) > 1 and any(_is_called(form, step) for form in inside):
            inside = [form for form in inside if _is_called(form, step)]
        else:
            steps.append(step)
            fields = [form.model_fields[step] for form in inside if step in form.model_fields]
            forms, inside = inside, [form for field in fields for form in _forms(field.annotation)]
    return steps, forms


def _is_called(form: type[BaseModel], name: str) -> bool:
    """Whether ``name`` is what tells ``form`` from its alternatives."""
    kinds = (field.annotation for field in form.model_fields.values())
    return any(get_origin(kind) is Literal and name in get_args(kind) for kind in kinds)


def _forms(annotation: Any) -> list[type[BaseModel]]:
    """The forms that ``annotation`` speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [form for argument in get_args(annotation) for form in _forms(argument)]


def _place(loc: Sequence[str | int]) -> str:
    """``("messages", 0, "content")`` as ``messages[0].content``."""
    text = ""
    for step in loc:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f".{step}" if text else step
    return text


def shown(value: object) -> str:
    """``value`` as a message repeats it: short, and without line breaks."""
    if isinstance(value, str | list):
        value = value[:_LONGEST_VALUE]
    text = ""
    try:
        for piece in json.JSONEncoder().iterencode(value):  # of a large value only the beginning
            text += piece
            if len(text) > _LONGEST_VALUE:
                break
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
