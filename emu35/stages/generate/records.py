"""Prompts from a JSONL file, each of which may replace what the call says.

A line is an object with a ``prompt``; the other keys are those of :data:`FIELDS`, all optional::

    {"prompt": "a red cat", "id": "cat", "task": "x2i", "images": ["cat.png"], "size": "32x32",
     "seed": 3, "guidance": 2.5, "temperature": 0.9, "text_top_k": 50, "max_new_tokens": 2000}

Paths of images are relative to the file. Keys that are none of these belong to whoever made the
file and are left alone, unless they look like one of these misspelled.
"""

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emu35.dida.samplers import Sampler
from emu35.errors import ConfigError, DataError
from emu35.inference.ask import SamplingOverride, parse_size
from emu35.inference.grammar import GridSize
from emu35.inference.request import Decoder, stray_numbers
from emu35.stages.generate.options import GenerateOptions, Wish, wish_of
from emu35.tokens.template import TASKS, Task

_FORM = 'a line is {"prompt": "..."}'


class _Wrong(Exception):
    """A value that is not what its key needs; says what it should be."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Wrong("must be a string")
    return value


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _Wrong("must be a string or a whole number")
    return str(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Wrong("must be a whole number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Wrong("must be a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _texts(value: Any) -> tuple[str, ...]:
    values: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise _Wrong("must be a string or a list of strings")
    return tuple(values)


def _task(value: Any) -> Task:
    names = [task.value for task in Task]
    if value not in names:
        raise _Wrong(f"must be one of {', '.join(names)}")
    return Task(value)


def _decoder(value: Any) -> Decoder:
    if value not in list(Decoder):
        raise _Wrong(f"must be one of {', '.join(Decoder)}")
    return Decoder(value)


def _sampler(value: Any) -> Sampler:
    if value not in list(Sampler):
        raise _Wrong(f"must be one of {', '.join(Sampler)}")
    return Sampler(value)


def _size(value: Any) -> GridSize:
    try:
        return parse_size(_text(value))
    except (ConfigError, _Wrong):
        raise _Wrong('must be "HEIGHTxWIDTH" in codes, such as "64x48"') from None


FIELDS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "prompt": _text,
        "id": _id,
        "task": _task,
        "images": _texts,
        "size": _size,
        "ratio": _text,
        "seed": _whole,
        "guidance": _number,
        "temperature": _number,
        "top_k": _whole,
        "top_p": _number,
        "text_temperature": _number,
        "text_top_k": _whole,
        "text_top_p": _number,
        "max_new_tokens": _whole,
        "steps": _whole,
        "stop": _texts,
        "decoder": _decoder,
        "denoise_steps": _whole,
        "sampler": _sampler,
        "denoise_shift": _number,
        "guidance_until": _number,
    }
)
"""The keys of a record and what reads each; null leaves a key to the call."""

_PARALLEL = ("denoise_steps", "sampler", "denoise_shift", "guidance_until")
_SAMPLING = tuple(field.name for field in fields(SamplingOverride))


def read_records(
    file: Path, *, options: GenerateOptions
) -> tuple[list[Wish], list[tuple[str, list[str]]]]:
    """The wishes of ``file`` in order, blank lines left out, and (line, problems) of every line
    that is none.

    Raises:
        DataError: the file cannot be read at all.
    """
    wishes: list[Wish] = []
    wrong: list[tuple[str, list[str]]] = []
    for number, line in record_lines(file):
        where = f"{file}, line {number}"
        values, problems = _read(line)
        said = {name: values.get(name) for name in _PARALLEL}
        problems += stray_numbers(values.get("decoder", options.decoder), said)
        if problems:
            wrong.append((where, problems))
        else:
            wishes.append(_wish(values, options=options, where=where, folder=file.parent))
    return wishes, wrong


def record_lines(file: Path) -> list[tuple[int, str]]:
    """The lines of ``file`` that are not blank, each with its number, counted from 1.

    Raises:
        DataError: the file cannot be read at all.
    """
    try:
        # Not splitlines(): U+2028 inside a prompt is no end of a line of JSON.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); give a UTF-8 file of prompts") from None
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _read(line: str) -> tuple[dict[str, Any], list[str]]:
    """The values of a line under their keys, and what is wrong with it."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, [f"{error}; {_FORM}"]
    if not isinstance(record, dict) or "prompt" not in record:
        return {}, [f"no prompt in it; {_FORM}"]
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in record.items():
        if key not in FIELDS:
            if close := difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.8):
                problems.append(f"unknown key {key!r}. Did you mean {close[0]!r}?")
            continue
        if value is None and key != "prompt":
            continue
        try:
            values[key] = FIELDS[key](value)
        except _Wrong as error:
            problems.append(f"{key}={json.dumps(value)[:60]} {error}")
    return values, problems


def _wish(values: dict[str, Any], *, options: GenerateOptions, where: str, folder: Path) -> Wish:
    wish = wish_of(options, prompt=values.pop("prompt"), where=where)
    visual = {name: values.pop(name) for name in _SAMPLING if name in values}
    text = {name: values.pop(f"text_{name}") for name in _SAMPLING if f"text_{name}" in values}
    if "images" in values:
        values["images"] = tuple(folder / path for path in values["images"])
    # Either fixes the grid, so one of a record takes the place of both of the call.
    if "size" in values or "ratio" in values:
        wish = replace(wish, size=None, ratio=None)
    # What the call says of pictures is meant for records that draw: a chat draws if it says so.
    if "task" in values and not TASKS[values["task"]].images:
        wish = replace(wish, size=None, ratio=None, steps=None)
    return replace(
        wish,
        visual=replace(wish.visual, **visual),
        text=replace(wish.text, **text),
        own_seed="seed" in values,
        **values,
    )
