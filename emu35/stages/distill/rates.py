"""Prompts by difficulty: how often a model's answers to each pass, and which are worth learning
from.

A group whose answers all fail or all pass teaches nothing, so prompts are kept whose pass rate
lies between. Answers are sampled, judged and committed as in distillation; the thresholds come in
afterwards, and the same call with others samples nothing again. Two files come of it: the prompts
that were kept, and ``rates.jsonl`` with a line for every prompt::

    {"id": "prompts.jsonl:1 cat", "prompt": 0, "samples": 8, "unscored": 0, "incomplete": 1,
     "passed": 3, "rate": 0.375, "mean": 0.61, "least": 0.25, "best": 1.0, "kept": true,
     "why": null}
"""

import json
import math
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from emu35.data.ingest.manifest import DoneInput, Manifest, lock_folder, open_books
from emu35.data.ingest.options import Existing
from emu35.data.shards import atomic_file
from emu35.errors import ConfigError, DataError
from emu35.log.console import Console, human_time
from emu35.stages.data import file_errors
from emu35.stages.distill.job import Job, Plan, make_plan
from emu35.stages.distill.judge import Drop, Sample
from emu35.stages.distill.options import DistillOptions
from emu35.stages.distill.prompts import Prompt, Stretch
from emu35.stages.distill.run import identity_of, note_samples, noted_samples
from emu35.stages.generate.options import GenerateOptions

KEPT_FILE, RATES_FILE = "kept.jsonl", "rates.jsonl"


class Why(StrEnum):
    """Why a prompt was not kept."""

    hard = "too hard: the pass rate lies below the lowest"
    easy = "too easy: the pass rate lies above the highest"
    unscored = "no answer has a score"


@dataclass(kw_only=True, slots=True)
class FilterOptions:
    """One call of ``emu35 data filter-prompts``.

    Attributes:
        ask: the model, the prompts (``prompts_file`` alone), what is asked of each, and the folder
            of the results (``out``).
        reward: name of a reward (:func:`emu35.rewards.build.find_reward`).
        pass_at: the reward from which on an answer passes.
        samples: answers to every prompt.
        low, high: prompts whose pass rate lies in [low, high] are kept.
        prompts_per_commit: prompts that are committed together.
    """

    ask: GenerateOptions
    reward: str
    pass_at: float
    samples: int = 8
    low: float = 0.1
    high: float = 0.9
    prompts_per_commit: int = 64
    existing: Existing = Existing.resume

    def problems(self) -> Iterator[str]:
        """What is wrong with the thresholds."""
        if not math.isfinite(self.pass_at):
            yield f"pass_at={self.pass_at} must be a finite number"
        if not 0 <= self.low <= self.high <= 1:
            yield f"low={self.low} and high={self.high} must be shares with 0 <= low <= high <= 1"

    def distilling(self) -> DistillOptions:
        """The same in terms of what samples."""
        return DistillOptions(
            ask=self.ask,
            source="prompts",
            samples=self.samples,
            reward=self.reward,
            prompts_per_shard=self.prompts_per_commit,
            existing=self.existing,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PassRate:
    """How the answers to a prompt did. Those that are no whole answer (``incomplete``) do not pass;
    those that the reward could not judge (``unscored``) are left out. ``rate``, ``mean``, ``least``
    and ``best`` are None where there is nothing to take them of."""

    id: str
    prompt: int
    samples: int
    unscored: int
    incomplete: int
    passed: int
    rate: float | None
    mean: float | None
    least: float | None
    best: float | None
    kept: bool
    why: Why | None


def pass_rate(
    prompt: Prompt, rows: Sequence[dict[str, Any]], *, options: FilterOptions
) -> PassRate:
    """The rate of ``prompt`` from ``rows`` of its samples (:meth:`Sample.row`)."""
    scores = [float(row["reward"]) for row in rows if row["reward"] is not None]
    unscored = sum(row["why"] == Drop.unscored.value for row in rows)
    passed = sum(score >= options.pass_at for score in scores)
    counted = len(rows) - unscored
    rate = passed / counted if counted else None
    why = None
    if rate is None:
        why = Why.unscored
    elif rate < options.low:
        why = Why.hard
    elif rate > options.high:
        why = Why.easy
    return PassRate(
        id=prompt.id,
        prompt=prompt.number,
        samples=len(rows),
        unscored=unscored,
        incomplete=counted - len(scores),
        passed=passed,
        rate=rate,
        mean=sum(scores) / len(scores) if scores else None,
        least=min(scores, default=None),
        best=max(scores, default=None),
        kept=why is None,
        why=why,
    )


@dataclass(kw_only=True, slots=True)
class FilterSummary:
    """Counts over all prompts that are done, those of earlier runs (``skipped``) included."""

    rates: list[PassRate] = field(default_factory=list[PassRate])
    skipped: int = 0
    seconds: float = 0.0

    @property
    def kept(self) -> int:
        return sum(rate.kept for rate in self.rates)

    def lines(self) -> list[str]:
        """A few lines to print."""
        samples, passed, unscored, incomplete = (
            sum(getattr(rate, name) for rate in self.rates)
            for name in ("samples", "passed", "unscored", "incomplete")
        )
        rows = [
            f"{len(self.rates)} prompts, {samples} answers, {passed} of them passed: {self.kept} "
            f"prompts kept in {human_time(self.seconds)}"
        ]
        if self.skipped:
            rows.append(f"{self.skipped} prompts were answered already")
        left = Counter(rate.why.value for rate in self.rates if rate.why is not None)
        rows += [f"left out: {count} x {why}" for why, count in sorted(left.items())]
        if incomplete:
            rows.append(f"{incomplete} answers were incomplete, and did not pass")
        if unscored:
            rows.append(f"{unscored} answers could not be judged, and do not count")
        return rows


@file_errors()
def filter_prompts(options: FilterOptions) -> FilterSummary:
    """Sample, judge, and write the prompts that are neither too hard nor too easy; run again, it
    goes on where it was stopped.

    Raises:
        ConfigError: options or prompts that make no sense, all of them named.
        DataError: a reference that cannot be used, a reward that failed, a folder that holds
            answers to another call, or no prompt was kept.
        CheckpointError, ReleaseError, TokenizerError: a model that cannot be opened.
        Interrupted: on Ctrl-C, if anything was committed; else KeyboardInterrupt.
    """
    if problems := list(options.problems()):
        raise ConfigError(problems)
    begin = time.monotonic()
    console = Console(stream=sys.stderr)
    distilling = options.distilling()
    plan = make_plan(distilling, console=console)
    out = options.ask.out
    with lock_folder(out):
        manifest = open_books(
            out=out,
            folders=["."],
            identity=identity_of(distilling, described=plan.described, meta=plan.meta),
            existing=options.existing,
        )
        todo = [unit for unit in plan.units if manifest.find(unit) is None]
        if todo:
            Job(
                verb="filter",
                options=distilling,
                plan=plan,
                manifest=manifest,
                commit=partial(_commit, manifest=manifest),
            ).run(todo)
        summary = FilterSummary(rates=_rates(plan, manifest=manifest, options=options))
        _write(summary, plan=plan, options=options)
    summary.skipped = plan.prompts - sum(len(unit.prompts) for unit in todo)
    summary.seconds = time.monotonic() - begin
    print(f"{out}: " + "\n".join(summary.lines()))
    if summary.kept == 0:
        raise DataError(
            f"no prompt was kept: none of {plan.prompts} has a pass rate in [{options.low:g}, "
            f"{options.high:g}] at a reward of {options.pass_at:g}; {out / RATES_FILE} tells of "
            "each. The same command with other thresholds samples nothing again"
        )
    return summary


def _commit(stretch: Stretch, samples: Sequence[Sample], *, manifest: Manifest) -> None:
    note_samples(manifest, stretch=stretch, samples=samples)
    manifest.commit(
        DoneInput(
            path=str(stretch.path),
            fingerprint=stretch.fingerprint,
            shards=[],
            documents=len(samples),
            tokens=0,
            visual_tokens=0,
            rejects={},
        )
    )


def _rates(plan: Plan, *, manifest: Manifest, options: FilterOptions) -> list[PassRate]:
    rates: list[PassRate] = []
    for unit in plan.units:
        rows: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        for line in noted_samples(manifest, stretch=unit).splitlines():
            row = json.loads(line)
            rows[row["prompt"]].append(row)
        rates += [pass_rate(each, rows[each.number], options=options) for each in unit.prompts]
    return rates


def _write(summary: FilterSummary, *, plan: Plan, options: FilterOptions) -> None:
    """The two files, each whole or not at all."""
    out = options.ask.out
    prompts = [prompt for unit in plan.units for prompt in unit.prompts]
    with atomic_file(out / RATES_FILE) as file:
        for rate in summary.rates:
            file.write(json.dumps(asdict(rate)).encode() + b"\n")
    with atomic_file(out / KEPT_FILE) as file:
        for prompt, rate in zip(prompts, summary.rates, strict=True):
            if rate.kept:
                record = _moved(prompt, folder=out)
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _moved(prompt: Prompt, *, folder: Path) -> dict[str, Any]:
    """The record as it reads in a file in ``folder``: paths of images are relative to the file."""
    record = dict(prompt.record)
    if record.get("images"):
        record["images"] = [
            os.path.relpath(path.absolute(), folder.absolute()) for path in prompt.wish.images
        ]
    return record
