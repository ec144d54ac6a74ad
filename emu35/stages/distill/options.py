"""What one call of ``emu35 data distill`` may set, and what of it a rerun must repeat."""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from emu35.data.ingest.options import Existing
from emu35.errors import ConfigError
from emu35.stages.generate.options import GenerateOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Part ``number`` (from 1) of ``of`` jobs that share the prompts."""

    number: int
    of: int

    @property
    def name(self) -> str:
        """As file names have it; empty for the whole."""
        return f"{self.number}-of-{self.of}" if self.of > 1 else ""


WHOLE = Part(number=1, of=1)


def parse_part(text: str) -> Part:
    """A part such as ``2/8``.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(
            f"part {text!r} is no part; write I/N, the I-th of N jobs, counted from 1: 1/8 to 8/8"
        )
    return Part(number=int(match[1]), of=int(match[2]))


@dataclass(kw_only=True, slots=True)
class DistillOptions:
    """One call of ``emu35 data distill``.

    Attributes:
        ask: the model, the prompts (``prompts_file`` alone), what is asked of each, and the folder
            of the shards (``out``). What it says of pages, stories and streams means nothing here.
        source: name of the shards.
        samples: answers to every prompt.
        reward: name of a reward (:func:`emu35.rewards.build.find_reward`); None keeps everything
            that is whole.
        min_reward: the least reward of what is kept.
        keep_best: how many answers of a prompt are kept, best first; None for all.
        sequence_length: a longer document is dropped (tokens; 0: no limit).
        prompts_per_shard: prompts that are committed together; an interruption loses at most those
            in flight.
        shard_bytes: size at which a new shard is begun.
        part: which part of the prompts this job answers.
    """

    ask: GenerateOptions
    source: str
    samples: int = 1
    reward: str | None = None
    min_reward: float | None = None
    keep_best: int | None = None
    sequence_length: int = 0
    prompts_per_shard: int = 64
    shard_bytes: int = 256 * 2**20
    part: Part = WHOLE
    existing: Existing = Existing.resume

    def problems(self) -> Iterator[str]:
        """What is wrong with the call, whatever the prompts say."""
        for name, value, lowest in (
            ("samples", self.samples, 1),
            ("keep_best", self.keep_best, 1),
            ("sequence_length", self.sequence_length, 0),
            ("prompts_per_shard", self.prompts_per_shard, 1),
            ("shard_bytes", self.shard_bytes, 1),
        ):
            if value is not None and value < lowest:
                yield f"{name}={value} is too small; use at least {lowest}"
        if self.keep_best is not None and self.keep_best > self.samples:
            yield (
                f"keep_best={self.keep_best} of samples={self.samples} answers cannot be; "
                "keep fewer, or generate more"
            )
        if self.min_reward is not None and not math.isfinite(self.min_reward):
            yield f"min_reward={self.min_reward} must be a finite number"
        if self.reward is None:
            needs = {"min_reward": self.min_reward, "keep_best": self.keep_best}
            for name in [name for name, value in needs.items() if value is not None]:
                yield f"{name} needs a reward to go by; name one (reward), or leave {name} out"


def identity(
    options: DistillOptions, *, prompts: str, model: dict[str, Any], vision: str
) -> dict[str, Any]:
    """What decides which documents come out; a rerun must repeat it. ``prompts`` is the digest of
    their file, ``model`` what the weights and their prompts' form are known by, ``vision`` the
    digest of the image tokenizer."""
    ask = options.ask
    return {
        "source": options.source,
        **model,
        "vision": vision,
        "prompts": prompts,
        "part": options.part.name,
        "samples": options.samples,
        "seed": ask.seed,
        "task": ask.task.value,
        "images": [str(path) for path in ask.images],
        "size": str(ask.size) if ask.size else None,
        "ratio": ask.ratio,
        "image_area": ask.image_area,
        "guidance": ask.guidance,
        **{f"text_{name}": value for name, value in asdict(ask.text).items()},
        **asdict(ask.visual),
        "max_new_tokens": ask.max_new_tokens,
        "steps": ask.steps,
        "stop": list(ask.stop),
        "reward": options.reward,
        "min_reward": options.min_reward,
        "keep_best": options.keep_best,
        "sequence_length": options.sequence_length,
        "prompts_per_shard": options.prompts_per_shard,
        "shard_bytes": options.shard_bytes,
    }
