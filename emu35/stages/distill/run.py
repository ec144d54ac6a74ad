"""One call: from options to shards."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu35.checkpoint.codec import codec_folder, open_codec
from emu35.checkpoint.source import Described, describe, load_model
from emu35.config import ParallelConfig
from emu35.data.ingest.manifest import DoneInput, Manifest, lock_folder, open_books
from emu35.data.ingest.progress import Progress
from emu35.data.shards import ShardMeta, atomic_file
from emu35.data.writer import ShardWriter
from emu35.errors import DataError, Interrupted
from emu35.inference.ask import build_request
from emu35.inference.engine import Engine
from emu35.inference.lead import build_engine
from emu35.inference.memory import cache_tokens
from emu35.inference.request import Request
from emu35.log.console import Console, human_time
from emu35.rewards.find import find_reward
from emu35.stages.data import file_errors
from emu35.stages.distill.judge import Judge, Sample
from emu35.stages.distill.options import DistillOptions, identity
from emu35.stages.distill.prompts import (
    Fit,
    Prompt,
    Stretch,
    check_fit,
    own_prompts,
    read_prompts,
    stretches,
)
from emu35.stages.distill.work import Work
from emu35.stages.generate.references import References
from emu35.stages.generate.run import interruptible
from emu35.tokens.serialize import Modality
from emu35.tokens.text import TextTokenizer, build_text_tokenizer
from emu35.vision.codec import weights_digest

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
    plan = _plan(options, console=console)
    units = plan.units
    with lock_folder(options.ask.out, part=options.part.name):
        manifest = open_books(
            out=options.ask.out,
            folders=["."],
            identity=_identity(options, described=plan.described, meta=plan.meta),
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
                job = _Job(options=options, plan=plan, manifest=manifest)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What is known before anything is written and any weight of the model is read."""

    units: list[Stretch]
    described: Described
    tokenizer: TextTokenizer
    references: Callable[[], References]
    fit: Fit
    meta: ShardMeta
    judge: Judge

    @property
    def prompts(self) -> int:
        return sum(len(unit.prompts) for unit in self.units)


def _plan(options: DistillOptions, *, console: Console) -> _Plan:
    """Check everything that can be checked."""
    reward = find_reward(options.reward) if options.reward is not None else None
    prompts = own_prompts(read_prompts(options, reward=reward), part=options.part)
    described = describe(options.ask.source, step=options.ask.step, message=console.line)
    codec = open_codec(described, chosen=options.ask.vision)
    folder = codec_folder(described, chosen=options.ask.vision)
    assert folder is not None
    tokenizer = build_text_tokenizer(described.tokenizer)

    def references() -> References:
        positions = described.config.max_position_embeddings
        return References(codec=codec, area=options.ask.image_area, positions=positions)

    return _Plan(
        units=stretches(prompts, length=options.prompts_per_shard),
        described=described,
        tokenizer=tokenizer,
        references=references,
        fit=check_fit(
            prompts,
            options=options,
            described=described,
            tokenizer=tokenizer,
            references=references(),
        ),
        meta=ShardMeta(
            source=options.source,
            kind=described.tokenizer.kind.value,
            n_text=tokenizer.vocabulary.n_text,
            codebook_size=described.tokenizer.codebook_size,
            vision=weights_digest(folder),
        ),
        judge=Judge(options=options, tokenizer=tokenizer, codec=codec, reward=reward),
    )


def samples_path(manifest: Manifest) -> Path:
    """What tells of every sample, those of this part."""
    return manifest.out / f"samples{'-' if manifest.part else ''}{manifest.part}.jsonl"


def _identity(options: DistillOptions, *, described: Described, meta: ShardMeta) -> dict[str, Any]:
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


@dataclass(kw_only=True, slots=True)
class _Job:
    """The parts of a running distillation."""

    options: DistillOptions
    plan: _Plan
    manifest: Manifest

    def run(self, todo: Sequence[Stretch]) -> None:
        """Answer and commit ``todo``.

        Raises:
            Interrupted, KeyboardInterrupt: on Ctrl-C, after the step that was under way.
        """
        of = self.plan.prompts
        engine = self._engine()
        left = sum(len(stretch.prompts) for stretch in todo)
        progress = Progress(label=f"distill {self.options.source}", total=of, items="prompts")
        progress.skip(of - left)
        progress.begin(size=left)
        work = Work(
            engine=engine,
            judge=self.plan.judge,
            todo=todo,
            make=self._request,
            references=self.plan.references,
            ahead=self.options.ask.batch_size,
        )
        done = 0
        try:
            with interruptible() as interruption:
                while work.busy and not interruption.asked:
                    for stretch, samples in work.step():
                        self._commit(stretch, samples=samples)
                        done += len(stretch.prompts)
                    progress.update(done + work.judged, items=done + work.judged)
            if work.busy:
                self._stop(done=of - left + done, of=of)
        finally:
            progress.close()
            engine.close()

    def _stop(self, *, done: int, of: int) -> None:
        if not self.manifest.done:
            raise KeyboardInterrupt
        raise Interrupted(
            f"stopped: {done} of {of} prompts are done in {self.manifest.out}; the same command "
            "goes on with the others"
        )

    def _engine(self) -> Engine:
        ask, fit = self.options.ask, self.plan.fit
        model = load_model(
            self.plan.described,
            precision=ask.precision or self.plan.described.precision,
            parallel=ParallelConfig(tp=ask.tp),
        )
        at_once = len(fit.largest)
        slots = ask.cache_tokens or cache_tokens(fit.largest, model=model, at_once=at_once)
        return build_engine(
            model=model,
            tokenizer=self.plan.tokenizer,
            max_requests=at_once,
            max_length=fit.max_length,
            cache_tokens=slots,
        )

    def _request(self, prompt: Prompt, codes: Sequence[NDArray[np.integer]]) -> Request:
        return build_request(
            prompt.wish.ask(images=codes, seed=prompt.seed(0)),
            tokenizer=self.plan.tokenizer,
            template=self.options.ask.template or self.plan.described.template,
            max_positions=self.plan.described.config.max_position_embeddings,
        )

    def _commit(self, stretch: Stretch, *, samples: Sequence[Sample]) -> None:
        """Write the shards of a stretch and what became of its samples, then name it as done."""
        with atomic_file(self.manifest.notes(_KIND, path=stretch.path)) as file:
            for sample in samples:
                file.write(json.dumps(sample.row()).encode() + b"\n")
        kept = [sample for sample in samples if sample.drop is None]
        tokens = visual = 0
        with ShardWriter(
            folder=self.manifest.staging,
            meta=self.plan.meta,
            shard_bytes=self.options.shard_bytes,
            taken=self.manifest.shard_numbers("."),
            stem=self.manifest.stem,
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
        self.manifest.commit(
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


def _join_samples(manifest: Manifest, *, units: Sequence[Stretch]) -> None:
    """Write ``samples.jsonl`` anew from the samples of each stretch that is done."""
    with atomic_file(samples_path(manifest)) as file:
        for unit in units:
            if manifest.find(unit) is not None:
                file.write(manifest.notes(_KIND, path=unit.path).read_bytes())


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
