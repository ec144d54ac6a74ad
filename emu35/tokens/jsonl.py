"""JSON lines in, JSON lines out: the body of ``emu35 tokens encode`` and ``emu35 tokens decode``.

Encoding takes ``{"text": "..."}``, which becomes its ids and nothing more, or a document::

    {"parts": [{"text": "a red circle"}, {"codes": [[5, 9], [2, 7]]}]}

which becomes ``BOS parts EOS``, or the parts alone with ``"frame": false``. Two more parts exist so
that any ids can be written as a document: ``{"special": "<|extra_100|>"}`` and ``{"ids": [...]}``.
Other keys of a document (an id, a source) are left unread.

Decoding takes ``{"ids": [...]}``. Text ids give ``{"text": ...}``; where specials or images occur
the line also has ``parts`` (which encoding then prefers to ``text``), and ``text`` is the string
the official tokenizer gives, to be read with specials allowed.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from emu35.errors import DataError, Emu35Error
from emu35.tokens.document import Broken, Image, Part, Special, Text
from emu35.tokens.serialize import join_parts, split_parts
from emu35.tokens.text import TextTokenizer

_ENCODE_FORM = 'a line is {"text": "..."} or {"parts": [{"text": "..."}, {"codes": [[0, 1]]}]}'
_DECODE_FORM = 'a line is {"ids": [1, 2, 3]}'
_PART_FORM = 'a part has exactly one of "text", "codes", "special" or "ids"'


def encode_lines(
    lines: Iterable[str], *, tokenizer: TextTokenizer, allow_special: bool = False
) -> Iterator[str]:
    """One ``{"ids": [...]}`` for each line that is not blank.

    ``allow_special`` parses special strings inside text, as the official tokenizer does.

    Raises:
        DataError: at the first bad line, with its number (from 1) and what it should be.
    """
    for number, record in _records(lines, form=_ENCODE_FORM):
        try:
            ids = _encode(record, tokenizer=tokenizer, allow_special=allow_special)
        except Emu35Error as error:
            raise DataError(f"line {number}: {error}") from None
        yield json.dumps({"ids": ids})


def decode_lines(lines: Iterable[str], *, tokenizer: TextTokenizer) -> Iterator[str]:
    """One ``{"text": ...}``, with ``parts`` where there is more than text, for each line.

    Raises:
        DataError: at the first bad line, with its number (from 1) and what it should be.
    """
    for number, record in _records(lines, form=_DECODE_FORM):
        try:
            answer = _decode(record, tokenizer=tokenizer)
        except Emu35Error as error:
            raise DataError(f"line {number}: {error}") from None
        yield json.dumps(answer)


def _records(lines: Iterable[str], *, form: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record: object = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} is not JSON ({error}); {form}") from None
        if not isinstance(record, dict):
            raise DataError(f"line {number} is no JSON object; {form}")
        yield number, cast(dict[str, Any], record)


def _encode(record: dict[str, Any], *, tokenizer: TextTokenizer, allow_special: bool) -> list[int]:
    if "parts" not in record:
        if "text" not in record:
            raise DataError(f"found {_keys(record)}; {_ENCODE_FORM}")
        return tokenizer.encode(_string(record["text"], name="text"), allow_special=allow_special)
    frame = record.get("frame", True)
    if not isinstance(frame, bool):
        raise DataError(f'"frame" is {_short(frame)}; it must be true or false')
    items = _list(record["parts"], name="parts")
    parts = [_read_part(item, index=index) for index, item in enumerate(items)]
    ids = join_parts(parts, tokenizer, allow_special=allow_special)
    vocabulary = tokenizer.vocabulary
    return [vocabulary.bos, *ids, vocabulary.eos] if frame else ids


def _read_part(item: object, *, index: int) -> Part:
    if not isinstance(item, dict):
        raise DataError(f"part {index} is {_short(item)}; {_PART_FORM}")
    part = cast(dict[str, Any], item)
    if len(part) != 1:
        raise DataError(f"part {index} has {_keys(part)}; {_PART_FORM}")
    ((name, value),) = part.items()
    try:
        if name == "text":
            return Text(_string(value, name="text"))
        if name == "special":
            return Special(_string(value, name="special"))
        if name == "ids":
            return Broken(tuple(_integers(value, name="ids")), "given as ids")
        if name == "codes":
            return Image(_codes(value))
    except DataError as error:
        raise DataError(f"part {index}: {error}") from None
    raise DataError(f"part {index} has {_keys(part)}; {_PART_FORM}")


def _decode(record: dict[str, Any], *, tokenizer: TextTokenizer) -> dict[str, Any]:
    if "ids" not in record:
        raise DataError(f"found {_keys(record)}; {_DECODE_FORM}")
    ids = _integers(record["ids"], name="ids")
    answer: dict[str, Any] = {"text": tokenizer.decode(ids)}
    vocabulary = tokenizer.vocabulary
    if all(id < vocabulary.n_text for id in ids):
        return answer
    framed = len(ids) > 1 and ids[0] == vocabulary.bos and ids[-1] == vocabulary.eos
    parts = split_parts(ids[1:-1] if framed else ids, tokenizer)
    answer["parts"] = [_write_part(part) for part in parts]
    if not framed:
        answer["frame"] = False
    if problems := [part.reason for part in parts if isinstance(part, Broken)]:
        answer["problems"] = problems
    return answer


def _write_part(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"text": part.text}
    if isinstance(part, Image):
        return {"codes": part.codes_HW.tolist()}
    if isinstance(part, Special):
        return {"special": part.token}
    return {"ids": list(part.ids)}


def _codes(value: object) -> NDArray[np.int64]:
    rows = [_integers(row, name="codes, row") for row in _list(value, name="codes")]
    widths = sorted({len(row) for row in rows})
    if len(widths) > 1:
        raise DataError(f'"codes" has rows of different lengths {widths}; a grid is rectangular')
    return np.array(rows, dtype=np.int64)


def _string(value: object, *, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f'"{name}" is {_short(value)}; it must be a string')
    return value


def _list(value: object, *, name: str) -> list[object]:
    if not isinstance(value, list):
        raise DataError(f'"{name}" is {_short(value)}; it must be a list')
    return cast(list[object], value)


def _integers(value: object, *, name: str) -> list[int]:
    numbers: list[int] = []
    for number in _list(value, name=name):
        # JSON's true is an int to Python; codes and ids fit 32 bits.
        if not isinstance(number, int) or isinstance(number, bool) or abs(number) >= 2**31:
            raise DataError(f'"{name}" holds {_short(number)}; it must hold whole numbers')
        numbers.append(number)
    return numbers


def _keys(record: dict[str, Any]) -> str:
    return "no key" if not record else "keys " + _short(sorted(record))


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
