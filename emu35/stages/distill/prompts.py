"""The prompts of a job: read, checked against the model, and cut into stretches."""

import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emu35.checkpoint.source import Described
from emu35.errors import ConfigError, DataError
from emu35.inference.ask import build_request, prompt_seed
from emu35.inference.memory import request_slots
from emu35.inference.request import Decoder, Request
from emu35.rewards.named import NamedReward
from emu35.rewards.sample import Record
from emu35.stages.distill.options import DistillOptions, Part
from emu35.stages.generate.options import Wish, gathered
from emu35.stages.generate.records import record_lines
from emu35.stages.generate.references import References
from emu35.stages.generate.run import check
from emu35.tokens.template import Task
from emu35.tokens.text import TextTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt with its place in the whole file (``number``, from 0) and the ``id`` that its
    documents' ids begin with, in the form of ingestion."""

    number: int
    id: str
    wish: Wish
    record: Record

    def seed(self, sample: int) -> int:
        """The seed of one of its samples, the same in whichever part or order it is answered."""
        own = prompt_seed(self.wish.seed, index=0 if self.wish.own_seed else self.number)
        return prompt_seed(own, index=sample)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Prompts that are committed together: a unit of the books."""

    path: Path
    fingerprint: str
    prompts: Sequence[Prompt]


def read_prompts(options: DistillOptions, *, reward: NamedReward | None) -> list[Prompt]:
    """All prompts of the file, in order.

    Raises:
        ConfigError: naming everything that is wrong with the call and the prompts.
        DataError: the file cannot be read.
    """
    file = options.ask.prompts_file
    assert file is not None
    problems = list(options.problems())
    try:
        wishes = check(options.ask)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    lines = record_lines(file)
    records: list[Record] = [json.loads(line) for _, line in lines]
    problems += gathered(
        [
            (wish.where, list(_unfit(wish, record=record, reward=reward)))
            for wish, record in zip(wishes, records, strict=True)
        ]
    )
    if problems:
        raise ConfigError(problems)
    return [
        Prompt(
            number=number,
            id=f"{file.name}:{line}" + (f" {wish.id}" if wish.id is not None else ""),
            wish=wish,
            record=record,
        )
        for number, ((line, _), wish, record) in enumerate(zip(lines, wishes, records, strict=True))
    ]


def _unfit(wish: Wish, *, record: Record, reward: NamedReward | None) -> Iterator[str]:
    """Why a prompt that can be generated from cannot be distilled."""
    if not wish.ask(images=(), seed=0).draws:
        yield (
            f"task {wish.task.value} answers in text alone, and pictures are what is distilled; "
            "leave the prompt out, or give it a size"
        )
    if wish.decoder is not Decoder.ar:
        yield f"decoder {wish.decoder.value} is not for distillation, which goes token by token"
    if reward is not None:
        yield from reward.problems(record)


def own_prompts(prompts: Sequence[Prompt], *, part: Part) -> Sequence[Prompt]:
    """Those of ``part``: a run of neighbours, as even as can be.

    Raises:
        ConfigError: there are fewer prompts than parts.
    """
    if len(prompts) < part.of:
        raise ConfigError(
            f"{len(prompts)} prompts cannot be shared by {part.of} parts; use at most as many"
        )
    first, last = ((n * len(prompts)) // part.of for n in (part.number - 1, part.number))
    return prompts[first:last]


def stretches(prompts: Sequence[Prompt], *, length: int) -> list[Stretch]:
    """``prompts`` cut every ``length``, each named by its first and last."""
    cut = [prompts[first : first + length] for first in range(0, len(prompts), length)]
    return [
        Stretch(
            path=Path(f"prompts {own[0].number}..{own[-1].number}"),
            fingerprint=_fingerprint(own),
            prompts=own,
        )
        for own in cut
    ]


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    """Changes with the prompts, and with the size or the time of their references."""
    sha = hashlib.sha256()
    for prompt in prompts:
        sha.update(json.dumps(dict(prompt.record), sort_keys=True).encode())
        for path in prompt.wish.images:
            found = path.stat()
            sha.update(f"{found.st_size} {found.st_mtime_ns}\0".encode())
    return sha.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What an engine must hold: the longest stream, and the requests with the largest caches."""

    max_length: int
    largest: list[Request]


def check_fit(
    prompts: Sequence[Prompt],
    *,
    options: DistillOptions,
    described: Described,
    tokenizer: TextTokenizer,
    references: References,
) -> Fit:
    """Build every request once, with references of the right sizes and no codes.

    Raises:
        ConfigError: naming every prompt that does not fit the model, and why.
        DataError: naming every reference that cannot be used.
    """
    at_once = min(options.ask.batch_size, len(prompts) * options.samples)
    largest: list[tuple[int, int, Request]] = []
    longest = 0
    found: list[tuple[str, list[str]]] = []
    shapes: dict[tuple[Path, Task], tuple[int, int]] = {}
    unusable: dict[str, str] = {}
    for prompt in prompts:
        wish = prompt.wish
        problems: list[str] = []
        try:
            for path in wish.images:
                if (path, wish.task) not in shapes:
                    shapes[path, wish.task] = references.shape(path, task=wish.task)
            empty = [np.zeros(shapes[path, wish.task], dtype=np.int64) for path in wish.images]
            request = build_request(
                wish.ask(images=empty, seed=prompt.seed(0)),
                tokenizer=tokenizer,
                template=options.ask.template or described.template,
                max_positions=described.config.max_position_embeddings,
            )
            longest = max(longest, request.slots)
            # The number keeps requests, which have no order, from being compared.
            heapq.heappush(largest, (request_slots(request), prompt.number, request))
            if len(largest) > at_once:
                heapq.heappop(largest)
        except DataError as error:
            unusable.setdefault(str(error), f"{wish.where}: {error}")
        except ConfigError as error:
            problems = error.problems
        found.append((wish.where, problems))
    if unusable:
        raise DataError("\n".join(unusable.values()))
    if problems := gathered(found):
        raise ConfigError(problems)
    ordered = [request for _, _, request in sorted(largest, reverse=True, key=lambda e: e[:2])]
    repeated = [request for request in ordered for _ in range(options.samples)]
    return Fit(max_length=longest, largest=repeated[:at_once])
