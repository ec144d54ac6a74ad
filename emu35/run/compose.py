"""Overrides such as ``experiment=demo/pretrain optim.lr=3e-4`` into one validated RunConfig.

Hydra does what it is best at, the composition of YAML files through their defaults lists; values
stay plain until :mod:`emu35.config.schema` fits them to the dataclasses. Hydra would stop at the
first mistake. Here each override is parsed, looked up and applied by itself, so that one error
names every mistake of the command line, and the rules between sections as well.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from emu35.config.io import resolve, run_identity
from emu35.config.root import KINDS, RunConfig
from emu35.config.rules import find_problems
from emu35.config.schema import (
    Misfits,
    Plain,
    build,
    did_you_mean,
    field_types,
    is_mapping,
    to_plain,
    unknown_key,
    with_defaults,
)
from emu35.errors import ConfigError

ROOT = "config"
"""Name of the root file of a ``configs`` folder, without its suffix."""


def compose(overrides: Iterable[str], *, configs: Path | None = None) -> RunConfig:
    """The validated configuration that ``overrides`` describe.

    ``configs`` is a folder of more groups and experiments, searched besides the ones of emu35.

    Raises:
        ConfigError: naming every mistake in the overrides, in the values and between sections.
    """
    if configs is not None and not configs.is_dir():
        raise ConfigError(f"--configs {configs} is no folder; name one with groups or experiments")
    folders = [find_configs(), *([configs] if configs else [])]
    parsed = _parse(overrides, folders=folders)
    problems = list(parsed.problems)
    base = _compose_groups(parsed.groups, folders=folders)
    if parsed.bad_groups:
        # The group that was meant decides what the other keys mean: only report the certain ones.
        problems += [text for edit in parsed.edits if (text := _unknown_anywhere(edit.key))]
        raise ConfigError(problems)
    misfits: Misfits = {}
    config = _fit(base, parsed.edits, misfits=misfits)
    if config is None:
        problems += misfits.values()
        # Leave out what does not fit, so that broken rules are reported in the same breath.
        fitting: list[_Edit] = []
        for edit in parsed.edits:
            if _fit(base, [*fitting, edit], misfits={}) is not None:
                fitting.append(edit)
        config = _fit(base, fitting, misfits={})
    if config is not None:
        problems += find_problems(config)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def adapt(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """``config``, that of a run, with other values where a run may change them.

    Raises:
        ConfigError: naming every mistake in the overrides, every key that makes it another run, and
            every rule that is broken.
    """
    parsed = _parse(overrides, folders=[find_configs()])
    problems = list(parsed.problems)
    problems += [
        f"{group}={option} chooses a whole group; here a run's own values are changed one by one, "
        "as in parallel.tp=2"
        for group, option in parsed.groups.items()
    ]
    misfits: Misfits = {}
    changed = _fit(to_plain(config), parsed.edits, misfits=misfits)
    problems += misfits.values()
    if changed is not None:
        before, after = run_identity(config), run_identity(changed)
        problems += [
            f"{key} decides what is computed: with another value it is another run; leave it out"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
        problems += find_problems(changed)
    if changed is None or problems:
        raise ConfigError(problems)
    return changed


def find_configs() -> Path:
    """The folder of YAML groups: beside the package in a checkout, else where a wheel puts it."""
    package = Path(str(files("emu35")))
    shared = Path(sys.prefix) / "share" / "emu35" / "configs"
    places = (package.parent / "configs", package / "_configs", shared)
    for folder in places:
        if (folder / f"{ROOT}.yaml").is_file():
            return folder
    raise ConfigError(f"{ROOT}.yaml is in none of {', '.join(map(str, places))}; reinstall emu35")


def group_options(group: str, *, folders: Iterable[Path]) -> list[str]:
    """The options of a group, sorted; an option in a subfolder is named ``sub/option``."""
    roots = [folder / group for folder in folders]
    return sorted(
        {p.relative_to(r).with_suffix("").as_posix() for r in roots for p in r.rglob("*.yaml")}
    )


_PLAIN_WORD = re.compile(r"\+{0,2}(?P<key>\w+(\.\w+)+|run_dir|name)=(?P<value>[^\[{\"'].*)")
"""A value that Hydra's grammar has no reading for, such as a path with an apostrophe or an equals
sign, is meant as it stands, unless it begins like a list, a section or a quoted text."""


@dataclass(kw_only=True, slots=True)
class _Edit:
    """One override of a value: set ``key`` to ``value``, or remove ``key``."""

    key: str
    value: Plain = None
    remove: bool = False


@dataclass(kw_only=True, slots=True)
class _Parsed:
    groups: dict[str, str] = field(default_factory=dict[str, str])
    edits: list[_Edit] = field(default_factory=list[_Edit])
    problems: list[str] = field(default_factory=list[str])
    bad_groups: bool = False


def _parse(overrides: Iterable[str], *, folders: list[Path]) -> _Parsed:
    """Sort overrides into choices of a group option and edits of a value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = _Parsed()
    groups = {p.name for folder in folders for p in folder.iterdir() if p.is_dir()}
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            word = _PLAIN_WORD.fullmatch(text)
            if word:
                parsed.edits.append(_Edit(key=word["key"], value=word["value"]))
            else:
                parsed.problems.append(
                    f"cannot read {text!r}; an override is key=value, as in optim.lr=3e-4 or "
                    "experiment=demo/pretrain (lists are [1,2], text with commas is '\"a, b\"')"
                )
            continue
        key = override.key_or_group
        if override.is_sweep_override():
            parsed.problems.append(
                f"{text!r} describes several runs; one run has one value (a list is [1,2])"
            )
            continue
        remove = override.type == OverrideType.DEL
        value: Any = None if remove and override.is_delete() else override.value()
        if key in groups and not remove and not is_mapping(value):
            at = f"@{override.package}" if override.package else ""
            add = "+" if override.is_add() and at else ""
            _choose(parsed, group=key, option=value, folders=folders, entry=f"{add}{key}{at}")
        else:
            parsed.edits.append(_Edit(key=key, value=value, remove=remove))
    return parsed


def _choose(parsed: _Parsed, *, group: str, option: Plain, folders: list[Path], entry: str) -> None:
    """Note that ``option`` of ``group`` is wanted. ``entry`` is the group, or where its options are
    entries of a section, which of them: ``+reward@stage.rewards.NAME``, without the plus for one
    that is there."""
    options = group_options(group, folders=folders)
    name = "null" if option is None else str(option)
    if entry in parsed.groups:
        parsed.problems.append(f"{entry} is chosen twice: {parsed.groups[entry]} and {name}")
        return
    if name not in options and not (name == "null" and group == "experiment"):
        parsed.bad_groups = True
        hint = did_you_mean(name, options)
        parsed.problems.append(f"unknown {group} '{name}'; available: {', '.join(options)}.{hint}")
        return
    if option is not None:  # experiment=null is what the root file says already
        parsed.groups[entry] = name


def _compose_groups(groups: Mapping[str, str], *, folders: list[Path]) -> dict[str, Plain]:
    """What the YAML files alone say, as plain values with interpolations left in place."""
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    chosen = [f"{group}={option}" for group, option in groups.items()]
    more = ",".join(f"file://{folder.resolve()}" for folder in folders[1:])
    if more:
        chosen.append(f"hydra.searchpath=[{more}]")
    try:
        with initialize_config_dir(str(folders[0].resolve()), version_base="1.3"):
            tree = OmegaConf.to_container(hydra_compose(ROOT, overrides=chosen), resolve=False)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        text = re.sub(r"\s*\n\s*", " ", str(error)).strip()
        raise ConfigError(f"the files of {' '.join(chosen) or 'configs'}: {text}") from None
    assert is_mapping(tree)
    return dict(tree)


def _fit(base: Mapping[str, Plain], edits: list[_Edit], *, misfits: Misfits) -> RunConfig | None:
    tree = dict(base)
    for edit in edits:
        _apply(tree, edit=edit, misfits=misfits)
    return build(resolve(with_defaults(tree), misfits=misfits), misfits=misfits)


def _apply(tree: dict[str, Plain], *, edit: _Edit, misfits: Misfits) -> None:
    *parents, name = edit.key.split(".")
    node = tree
    for parent in parents:
        # A scalar in the way is replaced: the schema then says that no section belongs there.
        below = node.get(parent)
        node[parent] = node = dict(below) if is_mapping(below) else {}
    before = node.get(name)
    if not edit.remove:
        merge = is_mapping(before) and is_mapping(edit.value)
        node[name] = dict(before or {}) | dict(edit.value) if merge else edit.value
    elif name in node:
        del node[name]
    else:
        here = ", ".join(node) or "nothing"
        misfits[edit.key] = f"~{edit.key} removes what is not there; present: {here}"


@cache
def _classes(section: str) -> tuple[Any, ...]:
    return (
        tuple(KINDS[section].values()) if section in KINDS else (field_types(RunConfig)[section],)
    )


def _unknown_anywhere(key: str) -> str | None:
    """The complaint about ``key`` if no kind of its section has such a field."""
    section, _, rest = key.partition(".")
    if section not in field_types(RunConfig):
        return unknown_key(section, RunConfig)
    name = rest.split(".")[0]
    classes = _classes(section)
    if not name or any(is_dataclass(cls) and name in field_types(cls) for cls in classes):
        return None
    first: type = classes[0]
    if not is_dataclass(first):
        return f"{key}: {section} is a single value; use {section}=VALUE"
    return unknown_key(f"{section}.{name}", first)
