"""Evaluation of parallel decoding: who draws which prompts, and how the pictures are judged."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from emu35.config.check import at_least
from emu35.config.dida import Sampler
from emu35.config.evaluation import TRAINING, training_problems
from emu35.config.stage import StageConfig


class Features(StrEnum):
    """What pictures are turned into before Frechet distances are taken.

    ``tokenizer``: mean and standard deviation, over the places of a picture, of the latents that
    the model's own image tokenizer finds codes for. Nothing is downloaded, and the distance
    compares with no published one.
    ``inception``: the 2048 features of Inception-v3 that FID is defined by (``pip install
    'emu35[evaluate]'``, which fetches the weights when they are first used).
    """

    tokenizer = "tokenizer"
    inception = "inception"


@dataclass(kw_only=True, slots=True)
class DiDAEvalConfig(StageConfig):
    """Quality against steps and time, decoding pictures token by token and in parallel.

    ``init_from`` is the adapted run or release, ``vision`` an image tokenizer in place of its own,
    ``precision`` the type of its parameters. The first ``count`` lines of ``prompts`` (JSON lines
    with ``prompt`` and ``scene``; 0: all of them) are drawn token by token, by ``ar_seeds`` seeds,
    and in parallel by every sampler of ``samplers`` in every number of steps of ``denoise_steps``.

    ``size`` is height and width in codes. ``guidance`` and ``temperature`` hold for pictures,
    ``text_temperature`` for the text before them, ``max_new_tokens`` for both; null is what the
    task recommends. ``batch_size`` pictures are drawn at a time: times are those of such a batch.
    ``shown`` prompts have their pictures put side by side.

    The loss of codes at ``times`` is taken on the sets of ``data.validation``, or where there are
    none, on true pictures of the first ``documents`` prompts.
    """

    kind: str = "dida_eval"
    steps: int = TRAINING["steps"]
    global_batch_size: int = TRAINING["global_batch_size"]
    micro_batch_size: int = TRAINING["micro_batch_size"]
    validate_every: int = TRAINING["validate_every"]
    vision: str | None = None
    prompts: str = ""
    count: int = 0
    samplers: list[Sampler] = field(default_factory=lambda: [Sampler.kinetic_euler])
    denoise_steps: list[int] = field(default_factory=lambda: [4, 8, 12, 25, 50])
    ar_seeds: int = 2
    size: list[int] = field(default_factory=lambda: [8, 8])
    guidance: float | None = None
    temperature: float | None = None
    text_temperature: float | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16
    features: Features = Features.tokenizer
    times: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    )
    documents: int = 64
    shown: int = 8

    def problems(self) -> Iterator[str]:
        # Zero-argument super() fails in slotted dataclasses (the class is rebuilt).
        yield from StageConfig.problems(self)
        remedies = {"steps": "steps of decoding are stage.denoise_steps"}
        yield from training_problems(self, remedies=remedies)
        if self.init_from is None:
            yield "stage.init_from names no model; give the run of stage=dida, or its release"
        if not self.prompts:
            yield (
                "stage.prompts names no file; give JSON lines with prompt and scene, such as the "
                "demo's corpus/heldout.jsonl"
            )
        yield from at_least("stage", 0, count=self.count, shown=self.shown)
        yield from at_least(
            "stage",
            1,
            ar_seeds=self.ar_seeds,
            batch_size=self.batch_size,
            documents=self.documents,
        )
        if len(self.size) != 2 or min(self.size) < 1:
            yield f"stage.size={self.size} is no height and width in codes, such as [8, 8]"
        elif self.size[0] != self.size[1]:
            yield f"stage.size={self.size}: scenes are square, and so must be their pictures"
        yield from self._lists()

    def _lists(self) -> Iterator[str]:
        for name, values in (
            ("samplers", self.samplers),
            ("denoise_steps", self.denoise_steps),
            ("times", self.times),
        ):
            if not values and name != "times":
                yield f"stage.{name} is empty; name at least one"
            if len(set(values)) != len(values):
                yield f"stage.{name}={[str(value) for value in values]} names one twice; drop it"
        for steps in self.denoise_steps:
            if steps < 1:
                yield f"stage.denoise_steps={self.denoise_steps}: {steps} steps; use at least 1"
        for time in self.times:
            if not 0 < time < 1:
                yield (
                    f"stage.times={self.times}: {time} is no time between noise (0) and the "
                    "picture (1)"
                )
