"""One call: from options to shards."""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from emu35.checkpoint.source import Described
from emu35.data.ingest.manifest import DoneInput, Manifest, lock_folder, open_books
from emu35.data.shards import ShardMeta, atomic_file
from emu35.data.writer import ShardWriter
from emu35.errors import DataError
from emu35.log.console import Console, human_time
from emu35.stages.data import file_errors
from emu35.stages.distill.job import Job, Plan, make_plan
from emu35.stages.distill.judge import Sample
from emu35.stages.distill.options import DistillOptions, identity
from emu35.stages.distill.prompts import Stretch
from emu35.tokens.serialize import Modality

_KIND = "samples"
"""Folder of the books for the samples of each stretch."""


@dataclass(kw_only=True, slots=True)
class DistillSummary:
    """Counts over all stretches that are done, those of earlier runs included. ``covered`` prompts
    have a kept sample; ``scored`` are rewards of all whole answers, ``kept_scores`` of those kept;
    ``drops`` maps why samples were not kept to how many; ``skipped`` prompts were done already."""

    prompts: int = 0
    covered: int = 0
    samples: int = 0
    kept: int = 0
    tokens: int = 0
    visual_tokens: int = 0
    shards: int = 0
    drops: dict[str, int] = field(default_factory=dict[str, int])
    scored: list[float] = field(default_factory=list[float])
    kept_scores: list[float] = field(default_factory=list[float])
    skipped: int = 0
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """A few lines to print."""
        rows = [
            f"{self.prompts} prompts, {self.samples} samples: {self.kept} kept of {self.covered} "
            f"prompts, {self.tokens} tokens ({self.visual_tokens} visual), {self.shards} shards in "
            f"{human_time(self.seconds)}"
        ]
        if self.skipped:
            rows.append(f"{self.skipped} prompts were done already")
        rows += [f"dropped: {count} x {why}" for why, count in sorted(self.drops.items())]
        if self.scored:
            means = f"{np.mean(self.scored):.4f} of {len(self.scored)} whole answers"
            if self.kept_scores:
                means += f"; {np.mean(self.kept_scores):.4f} of those kept"
            rows.append(f"mean reward: {means}")
        return rows


@file_errors()
def distill(options: DistillOptions) -> DistillSummary:
    """Answer the prompts of this part, write what is kept into shards and print a summary; run
    again, it goes on where it was stopped.

    Raises:
        ConfigError: options or prompts that make no sense, all of them named.
        DataError: a reference that cannot be used, a reward that failed, an output folder that
            cannot be used, or nothing at all was kept.
        CheckpointError, ReleaseError, TokenizerError: a model that cannot be opened.
        Interrupted: on Ctrl-C, if anything was committed; else KeyboardInterrupt.
    """
    begin = time.monotonic()
    console = Console(stream=sys.stderr)
    plan = make_plan(options, console=console)
    units = plan.units
    with lock_folder(options.ask.out, part=options.part.name):
        manifest = open_books(
            out=options.ask.out,
            folders=["."],
            identity=identity_of(options, described=plan.described, meta=plan.meta),
            existing=options.existing,
            part=options.part.name,
        )
        # Changed prompts are refused before anything is dropped for being damaged.
        for unit in units:
            manifest.find(unit)
        for line in manifest.drop_damaged(units):
            console.line(line)
        todo = [unit for unit in units if manifest.find(unit) is None]
        try:
            if todo:
                job = Job(
                    verb="distill",
                    options=options,
                    plan=plan,
                    manifest=manifest,
                    commit=partial(_commit, options=options, plan=plan, manifest=manifest),
                )
                job.run(todo)
        finally:
            _join_samples(manifest, units=units)
    summary = _summary(manifest, units=units)
    summary.skipped = plan.prompts - sum(len(unit.prompts) for unit in todo)
    summary.seconds = time.monotonic() - begin
    print(f"{options.ask.out}: " + "\n".join(summary.lines()))
    if summary.kept == 0:
        kept = ". The earlier shards were kept" if manifest.retired else ""
        raise DataError(
            f"none of {summary.samples} samples was kept; {samples_path(manifest)} says why{kept}"
        )
    return summary


def samples_path(manifest: Manifest) -> Path:
    """What tells of every sample, those of this part."""
    return manifest.out / f"samples{'-' if manifest.part else ''}{manifest.part}.jsonl"


def identity_of(
    options: DistillOptions, *, described: Described, meta: ShardMeta
) -> dict[str, Any]:
    """What a rerun must repeat."""
    ask = options.ask
    assert ask.prompts_file is not None
    assert meta.vision is not None
    return identity(
        options,
        prompts=hashlib.sha256(ask.prompts_file.read_bytes()).hexdigest()[:16],
        model={
            "model": str(described.path.resolve()),
            "step": described.step,
            "tokenizer": meta.kind,
            "codebook_size": meta.codebook_size,
            "template": (ask.template or described.template).value,
            "precision": (ask.precision or described.precision).value,
        },
        vision=meta.vision,
    )


def _commit(
    stretch: Stretch,
    samples: Sequence[Sample],
    *,
    options: DistillOptions,
    plan: Plan,
    manifest: Manifest,
) -> None:
    """Write the shards of a stretch and what became of its samples, then name it as done."""
    note_samples(manifest, stretch=stretch, samples=samples)
    kept = [sample for sample in samples if sample.drop is None]
    tokens = visual = 0
    with ShardWriter(
        folder=manifest.staging,
        meta=plan.meta,
        shard_bytes=options.shard_bytes,
        taken=manifest.shard_numbers("."),
        stem=manifest.stem,
    ) as writer:
        for sample in kept:
            assert sample.sequence is not None
            writer.append(sample.sequence, document_id=sample.id)
            tokens += len(sample.sequence)
            visual += int(np.count_nonzero(sample.sequence.modality == Modality.VISUAL))
    drops: dict[str, int] = {}
    for sample in samples:
        if sample.drop is not None:
            drops[sample.drop.value] = drops.get(sample.drop.value, 0) + 1
    manifest.commit(
        DoneInput(
            path=str(stretch.path),
            fingerprint=stretch.fingerprint,
            shards=[path.name for path in writer.paths],
            documents=len(kept),
            tokens=tokens,
            visual_tokens=visual,
            rejects=drops,
        )
    )


def note_samples(manifest: Manifest, *, stretch: Stretch, samples: Sequence[Sample]) -> None:
    """Write what became of the samples of a stretch into the books."""
    with atomic_file(manifest.notes(_KIND, path=stretch.path)) as file:
        for sample in samples:
            file.write(json.dumps(sample.row()).encode() + b"\n")


def noted_samples(manifest: Manifest, *, stretch: Stretch) -> bytes:
    """What :func:`note_samples` wrote, as lines of JSON."""
    return manifest.notes(_KIND, path=stretch.path).read_bytes()


def _join_samples(manifest: Manifest, *, units: Sequence[Stretch]) -> None:
    """Write ``samples.jsonl`` anew from the samples of each stretch that is done."""
    with atomic_file(samples_path(manifest)) as file:
        for unit in units:
            if manifest.find(unit) is not None:
                file.write(noted_samples(manifest, stretch=unit))


def _summary(manifest: Manifest, *, units: Sequence[Stretch]) -> DistillSummary:
    summary = DistillSummary(
        prompts=sum(len(unit.prompts) for unit in units if manifest.find(unit) is not None),
        tokens=sum(entry.tokens for entry in manifest.done),
        visual_tokens=sum(entry.visual_tokens for entry in manifest.done),
        shards=sum(len(entry.shards) for entry in manifest.done),
    )
    covered: set[int] = set()
    with samples_path(manifest).open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            summary.samples += 1
            if row["reward"] is not None:
                summary.scored.append(row["reward"])
            if row["kept"]:
                summary.kept += 1
                covered.add(row["prompt"])
                if row["reward"] is not None:
                    summary.kept_scores.append(row["reward"])
            else:
                summary.drops[row["why"]] = summary.drops.get(row["why"], 0) + 1
    summary.covered = len(covered)
    return summary
