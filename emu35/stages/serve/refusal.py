"""What a client is told when it does not get what it asked for: OpenAI's error shape.

``{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}``, where the message names the
value, the rule it breaks and the remedy.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

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
    return Refusal("; ".join(lines), param=_place(found[0]["loc"]) or None, code=found[0]["type"])


def _sentence(problem: Any, *, model: type[BaseModel]) -> str:
    place = _place(problem["loc"])
    if problem["type"] == "extra_forbidden":
        name = str(problem["loc"][-1])
        close = difflib.get_close_matches(name, list(model.model_fields), n=1)
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
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
