"""Prompts to judged answers, stretch by stretch: the model's part of a call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emu35.checkpoint.codec import codec_folder, open_codec
from emu35.checkpoint.source import Described, describe, load_model
from emu35.config import ParallelConfig
from emu35.data.ingest.manifest import Manifest
from emu35.data.ingest.progress import Progress
from emu35.data.shards import ShardMeta
from emu35.errors import Interrupted
from emu35.inference.ask import build_request
from emu35.inference.engine import Engine
from emu35.inference.lead import build_engine
from emu35.inference.memory import cache_tokens
from emu35.inference.request import Request
from emu35.log.console import Console
from emu35.rewards.build import find_reward
from emu35.stages.distill.judge import Judge, Sample
from emu35.stages.distill.options import DistillOptions
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
from emu35.tokens.text import TextTokenizer, build_text_tokenizer
from emu35.vision.codec import codes_dtype, weights_digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
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


def make_plan(options: DistillOptions, *, console: Console) -> Plan:
    """Check everything that can be checked.

    Raises:
        ConfigError: options or prompts that make no sense, all of them named.
        DataError: a reference that cannot be used.
        CheckpointError, ReleaseError, TokenizerError: a model that cannot be opened.
    """
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

    return Plan(
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
            vision_dtype=codes_dtype(folder),
        ),
        judge=Judge(options=options, tokenizer=tokenizer, codec=codec, reward=reward),
    )


@dataclass(kw_only=True, slots=True)
class Job:
    """A running call.

    Attributes:
        verb: what its progress is called.
        commit: keeps what became of a stretch, its samples in order.
    """

    verb: str

    options: DistillOptions
    plan: Plan
    manifest: Manifest
    commit: Callable[[Stretch, list[Sample]], None]

    def run(self, todo: Sequence[Stretch]) -> None:
        """Answer and commit ``todo``.

        Raises:
            Interrupted, KeyboardInterrupt: on Ctrl-C, after the step that was under way.
        """
        of = self.plan.prompts
        engine = self._engine()
        left = sum(len(stretch.prompts) for stretch in todo)
        progress = Progress(label=f"{self.verb} {self.options.source}", total=of, items="prompts")
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
                        self.commit(stretch, samples)
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
