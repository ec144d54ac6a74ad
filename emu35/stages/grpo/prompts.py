"""The prompts of a run: read and checked before any weight is."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from emu35.config.prompts import PromptTaskConfig
from emu35.errors import ConfigError, DataError
from emu35.inference.ask import parse_size
from emu35.inference.request import Decoder
from emu35.rewards.sample import Record
from emu35.stages.generate.options import GenerateOptions, Wish, gathered
from emu35.stages.generate.records import read_records, record_lines
from emu35.tokens.template import Task

_POLICY_KEYS = (
    "seed",
    "guidance",
    "temperature",
    "top_k",
    "top_p",
    "text_temperature",
    "text_top_k",
    "text_top_p",
)
"""What a file for generation may say of a prompt, and the behaviour policy says here."""


class Checking(Protocol):
    """What is asked of a reward here (:class:`~emu35.rewards.sample.Reward`)."""

    def problems(self, record: Record) -> list[str]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPrompt:
    """A prompt of task set ``task``. ``number`` is its place among the file's records (from 0),
    ``id`` how messages and pages name it, ``wish`` what is asked in a user's terms."""

    task: str
    number: int
    id: str
    wish: Wish
    record: Record


def read_tasks(
    tasks: Mapping[str, PromptTaskConfig],
    *,
    rewards: Mapping[str, Checking],
    section: str = "data.tasks",
    most: int | None = None,
) -> dict[str, list[TaskPrompt]]:
    """The prompts of every task, in the order of its file.

    Args:
        rewards: all that the tasks name.
        section: what the configuration calls ``tasks``, for messages.
        most: prompts that are taken from each file, the first ones; None for all.

    Raises:
        ConfigError: naming everything that is wrong with every file, by its lines.
    """
    problems: list[str] = []
    found: dict[str, list[TaskPrompt]] = {}
    for name, task in tasks.items():
        where = f"{section}.{name}"
        try:
            found[name] = _read_task(name, task=task, rewards=rewards, where=where, most=most)
        except ConfigError as error:
            problems += [f"{where}: {problem}" for problem in error.problems]
        except DataError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise ConfigError(problems)
    return found


def _read_task(
    name: str,
    *,
    task: PromptTaskConfig,
    rewards: Mapping[str, Checking],
    where: str,
    most: int | None,
) -> list[TaskPrompt]:
    known = [kind.value for kind in Task]
    if task.task not in known:
        raise ConfigError(f"task={task.task} is unknown; use one of {', '.join(known)}")
    file = Path(task.path)
    options = GenerateOptions(
        source=file,
        out=file.parent,
        task=Task(task.task),
        size=parse_size(task.size) if task.size is not None else None,
        max_new_tokens=task.max_new_tokens,
        steps=task.steps,
    )
    wishes, wrong = read_records(file, options=options)
    if wrong:
        raise ConfigError([f"{place}: {problem}" for place, found in wrong for problem in found])
    if not wishes:
        raise ConfigError(f"{file} has no prompt; write at least one")
    lines = record_lines(file)[:most]
    records: list[Record] = [json.loads(line) for _, line in lines]
    judges = {each: rewards[each] for each in (*task.rewards, *task.held_out)}
    read = list(zip(wishes[:most], records, strict=True))
    if problems := gathered(
        [(wish.where, _problems(wish, record=record, judges=judges)) for wish, record in read]
    ):
        raise ConfigError(problems)
    return [
        TaskPrompt(
            task=name,
            number=number,
            id=f"{file.name}:{line}" + (f" {wish.id}" if wish.id is not None else ""),
            wish=wish,
            record=record,
        )
        for number, ((line, _), (wish, record)) in enumerate(zip(lines, read, strict=True))
    ]


def _problems(wish: Wish, *, record: Record, judges: Mapping[str, Checking]) -> list[str]:
    """Why a prompt cannot be learned from, as far as its record says."""
    found = wish.problems()
    if stray := [key for key in _POLICY_KEYS if record.get(key) is not None]:
        found.append(
            f"{', '.join(stray)} of the record would make a behaviour policy of its own; leave it "
            "out: stage.rollout and the run's seed say how answers are drawn"
        )
    if wish.decoder is not Decoder.ar:
        found.append(
            f"decoder {wish.decoder.value} has no log-probabilities token by token to learn from; "
            "leave it out"
        )
    for reward in judges.values():
        found += reward.problems(record)
    return found


def fingerprint(prompts: Sequence[TaskPrompt]) -> str:
    """Changes with the records and their order, and with the sizes of their references in bytes
    (not with times, so that a copy of a run's files continues it)."""
    sha = hashlib.sha256()
    for prompt in prompts:
        sha.update(json.dumps(dict(prompt.record), sort_keys=True).encode())
        for path in prompt.wish.images:
            sha.update(f"\0{path.stat().st_size}".encode())
        sha.update(b"\n")
    return sha.hexdigest()[:32]
