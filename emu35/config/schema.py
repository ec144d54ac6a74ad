"""Plain values (what YAML holds) into the configuration dataclasses, naming every problem at once.

Hydra and OmegaConf can merge YAML into a dataclass too, but they stop at the first key that does
not fit, and a user with three typing mistakes would learn of them one run at a time. So Hydra
composes plain values (:mod:`emu35.run.compose`), and this module alone decides what fits the
schema: it is also what reads a run folder's ``config.yaml`` back. Unknown keys are refused because
a field that does not exist has no place to go.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Any, TypeGuard, Union, get_args, get_origin, get_type_hints

from emu35.config.root import ENTRY_KINDS, KINDS, RunConfig

Plain = Any
"""What YAML can hold: dict, list, str, int, float, bool or None."""

Misfits = dict[str, str]
"""Dotted key -> what is wrong there, in the order found."""

_MISSING = object()


def is_mapping(value: Plain) -> TypeGuard[Mapping[str, Plain]]:
    """Whether ``value`` is a section or named entries."""
    return isinstance(value, Mapping)


def is_list(value: Plain) -> TypeGuard[Sequence[Plain]]:
    """Whether ``value`` is a list (or a tuple, as a default may be)."""
    return isinstance(value, (list, tuple))


def to_plain(value: Any) -> Plain:
    """A configuration (or a part of one) as YAML-ready values, fields in their declared order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if is_mapping(value):
        return {str(key): to_plain(item) for key, item in value.items()}
    if is_list(value):
        return [to_plain(item) for item in value]
    return value


def build(tree: Mapping[str, Plain], *, misfits: Misfits) -> RunConfig | None:
    """Turn ``tree`` into a :class:`RunConfig`; None, and ``misfits`` filled, if it does not fit."""
    config = _build_section(RunConfig, tree, key="", misfits=misfits)
    return None if misfits else config


def with_defaults(tree: Mapping[str, Plain]) -> dict[str, Plain]:
    """``tree`` over the schema's defaults, so that interpolations can refer to any field.

    The class of a section with kinds follows from its ``kind``; an unknown kind contributes no
    defaults and is reported by :func:`build`.
    """
    defaults = to_plain(RunConfig())
    for section, kinds in KINDS.items():
        part = tree.get(section)
        kind = part.get("kind") if is_mapping(part) else None
        if isinstance(kind, str) and kind in kinds:
            defaults[section] = to_plain(kinds[kind]())
    return _overlay(defaults, tree)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'steps'?" or, when nothing is close, the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown_key(key: str, cls: type) -> str:
    """The message for ``key`` (dotted), whose last part is no field of ``cls``."""
    word = key.rpartition(".")[2]
    names = [f.name for f in dataclasses.fields(cls)]
    groups = ["experiment"] if cls is RunConfig else []
    hint = did_you_mean(word, names + groups)
    if not hint and cls is RunConfig:
        # A field given without its section: `lr=...` for `optim.lr=...`.
        homes = [f"{home}.{word}" for home in names if word in _section_fields(home)]
        hint = f" Did you mean '{homes[0]}'?" if homes else ""
    return f"unknown key '{key}' in {cls.__name__}.{hint or ' It has: ' + ', '.join(names) + '.'}"


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> resolved type annotation of a configuration class."""
    return get_type_hints(cls)


def _section_fields(section: str) -> set[str]:
    classes = (
        list(KINDS[section].values()) if section in KINDS else [field_types(RunConfig)[section]]
    )
    return {
        f.name for cls in classes if dataclasses.is_dataclass(cls) for f in dataclasses.fields(cls)
    }


def _overlay(below: Mapping[str, Plain], above: Mapping[str, Plain]) -> dict[str, Plain]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        nested = is_mapping(under) and is_mapping(value)
        merged[key] = _overlay(under or {}, value) if nested else value
    return merged


def _build_section(cls: type, tree: Plain, *, key: str, misfits: Misfits) -> Any:
    """An instance of ``cls`` from the mapping ``tree``; None if a field without default is bad."""
    if not is_mapping(tree):
        known = ", ".join(f.name for f in dataclasses.fields(cls))
        misfits.setdefault(key, _misfit(key, tree, f"a section with: {known}"))
        return None
    hints = field_types(cls)
    values: dict[str, Any] = {}
    for name in tree:
        if name not in hints:
            path = f"{key}.{name}" if key else str(name)
            misfits.setdefault(path, unknown_key(path, cls))
    complete = True
    for field in dataclasses.fields(cls):
        path = f"{key}.{field.name}" if key else field.name
        if field.name in tree:
            value = _build_value(hints[field.name], tree[field.name], key=path, misfits=misfits)
            if value is not _MISSING:
                values[field.name] = value
                continue
            complete = complete and _has_default(field)
        elif not _has_default(field):
            misfits.setdefault(path, f"{path} is not set and has no default; give it a value")
            complete = False
    return cls(**values) if complete else None


def _has_default(field: "dataclasses.Field[Any]") -> bool:
    has_value = field.default is not dataclasses.MISSING
    return has_value or field.default_factory is not dataclasses.MISSING


def _build_value(kind: Any, value: Plain, *, key: str, misfits: Misfits) -> Any:
    """``value`` as ``kind``, or _MISSING after reporting why it does not fit."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [arg for arg in get_args(kind) if arg is not type(None)]
        return _build_value(inner, value, key=key, misfits=misfits)
    if origin is list:
        if not is_list(value):
            misfits.setdefault(key, _misfit(key, value, "a list, as in [1, 2]"))
            return _MISSING
        (inner,) = get_args(kind)
        items = [
            _build_value(inner, item, key=f"{key}[{i}]", misfits=misfits)
            for i, item in enumerate(value)
        ]
        return _MISSING if any(item is _MISSING for item in items) else items
    if origin is dict:
        if not is_mapping(value):
            misfits.setdefault(key, _misfit(key, value, "named entries"))
            return _MISSING
        named, inner = get_args(kind)
        entries = {
            _build_name(named, name, key=key, misfits=misfits): _build_value(
                inner, item, key=f"{key}.{name}", misfits=misfits
            )
            for name, item in value.items()
        }
        complete = _MISSING not in entries and _MISSING not in entries.values()
        return entries if complete else _MISSING
    if dataclasses.is_dataclass(kind):
        cls = _class_of(kind, value, key=key, misfits=misfits)
        section = cls and _build_section(cls, value, key=key, misfits=misfits)
        return _MISSING if section is None else section
    return _build_scalar(kind, value, key=key, misfits=misfits)


def _build_name(kind: type, name: Plain, *, key: str, misfits: Misfits) -> Any:
    """The name of an entry: a word, or a number, which a run folder's file holds as a word."""
    if kind is not int:
        return str(name)
    try:
        return int(str(name))
    except ValueError:
        misfits.setdefault(
            f"{key}.{name}", f"{key} has an entry {name!r}; expected integers, as in {{1000: 0.5}}"
        )
        return _MISSING


def _class_of(base: Any, value: Plain, *, key: str, misfits: Misfits) -> type | None:
    """The dataclass of a section: ``base``, or the subclass that its ``kind`` selects."""
    kinds = KINDS.get(key) or ENTRY_KINDS.get(base)
    if kinds is None or not is_mapping(value):
        return base
    kind = value.get("kind", base().kind)
    if kind in kinds:
        return kinds[kind]
    known = ", ".join(kinds)
    hint = did_you_mean(str(kind), kinds)
    misfits.setdefault(key, f"{key}.kind={kind!r} is unknown; use one of {known}.{hint}")
    return None


def _build_scalar(kind: type, value: Plain, *, key: str, misfits: Misfits) -> Any:
    if issubclass(kind, Enum):
        names = [str(member.value) for member in kind]
        if isinstance(value, str) and value in names:
            return kind(value)
        hint = did_you_mean(str(value), names)
        misfits.setdefault(
            key, f"{key}={value!r} is not possible; use one of {', '.join(names)}.{hint}"
        )
        return _MISSING
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number:
        if math.isfinite(value):
            return float(value)
        misfits.setdefault(key, f"{key}={value} must be a finite number")
        return _MISSING
    # 1e4 is a float to YAML; as a count it is meant, and it is exact.
    if kind is int and number and float(value).is_integer():
        return int(value)
    if kind is bool and isinstance(value, bool):
        return value
    # A name such as 2024 reaches us as a number although the user wrote a word.
    if kind is str and (isinstance(value, str) or (number and isinstance(value, int))):
        return str(value)
    misfits.setdefault(key, _misfit(key, value, _EXPECTED[kind]))
    return _MISSING


_EXPECTED = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
}


def _misfit(key: str, value: Plain, expected: str) -> str:
    return f"{key}={_shown(value)} is {_kind_of(value)}; expected {expected}"


def _shown(value: Plain) -> str:
    """``value`` as YAML writes it, shortened."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _kind_of(value: Plain) -> str:
    if value is None:
        return "no value"
    if isinstance(value, bool):
        return "a boolean"
    if is_mapping(value):
        return "a section"
    if is_list(value):
        return "a list"
    if isinstance(value, int):
        return "an integer"
    return "a number" if isinstance(value, float) else "a string"
