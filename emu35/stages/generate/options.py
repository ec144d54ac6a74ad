"""What one call of ``emu35 generate`` may set, and what it asks of each prompt."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emu35.config import Precision
from emu35.dida.samplers import Sampler
from emu35.inference.ask import Ask, SamplingOverride, Turn
from emu35.inference.grammar import GridSize
from emu35.inference.request import Decoder, denoise_options, stray_numbers
from emu35.model.quantize import Quantization
from emu35.tokens.template import PromptTemplate, Task

_SHOWN = 5
"""Prompts that a message names one by one."""


@dataclass(kw_only=True, slots=True)
class GenerateOptions:
    """One call of ``emu35 generate``.

    ``source`` is a run or a release; ``vision`` overrides its image tokenizer. ``prompts`` come
    first, then the records of ``prompts_file``, each of which may replace what the call says.

    None everywhere else means: what the task recommends, what the model was trained for
    (``template``), or, for the grid, the last reference's size, else the model's own choice.
    ``size`` counts codes, ``ratio`` is a name such as 16:9, ``image_area`` (pixels) is what
    references are resized to. ``images`` are references of every prompt. ``steps`` is the number of
    pictures after which an answer ends. ``decoder`` dida decodes pictures in parallel, by
    ``sampler`` in ``denoise_steps`` steps, of which ``denoise_shift`` above 1 spends more near the
    noise, guided until the time ``guidance_until``. ``batch_size`` counts prompts in flight.
    ``logprobs`` adds to each row how likely every token was. ``page`` and ``story`` are the HTML
    page and protobuf. ``stream`` shows the text of a single prompt on standard output while it
    comes (None: where that is a terminal). ``cache_tokens`` are the slots of the engine's cache
    (None: as many as needed, as far as memory goes). ``quantize`` gives the layers' weights eight
    bits. ``tp`` is over how many ranks the model is split; all of them were started, and this is
    rank 0.
    """

    source: Path
    out: Path
    prompts: Sequence[str] = ()
    prompts_file: Path | None = None
    task: Task = Task.t2i
    images: Sequence[Path] = ()
    vision: Path | None = None
    template: PromptTemplate | None = None
    step: int | None = None
    precision: Precision | None = None
    quantize: Quantization | None = None
    seed: int = 0
    size: GridSize | None = None
    ratio: str | None = None
    image_area: int | None = None
    guidance: float | None = None
    text: SamplingOverride = field(default_factory=SamplingOverride)
    visual: SamplingOverride = field(default_factory=SamplingOverride)
    max_new_tokens: int | None = None
    steps: int | None = None
    stop: Sequence[str] = ()
    decoder: Decoder = Decoder.ar
    denoise_steps: int | None = None
    sampler: Sampler | None = None
    denoise_shift: float | None = None
    guidance_until: float | None = None
    batch_size: int = 16
    logprobs: bool = False
    page: bool = True
    story: bool = True
    stream: bool | None = None
    cache_tokens: int | None = None
    tp: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """One prompt with everything that holds for it. ``where`` is how messages name it; ``own_seed``
    tells a seed of its own from the call's, which is mixed with the prompt's place."""

    prompt: str
    where: str
    task: Task
    id: str | None = None
    images: tuple[Path, ...] = ()
    size: GridSize | None = None
    ratio: str | None = None
    guidance: float | None = None
    text: SamplingOverride = field(default_factory=SamplingOverride)
    visual: SamplingOverride = field(default_factory=SamplingOverride)
    seed: int = 0
    own_seed: bool = False
    max_new_tokens: int | None = None
    steps: int | None = None
    stop: tuple[str, ...] = ()
    decoder: Decoder = Decoder.ar
    denoise_steps: int | None = None
    sampler: Sampler | None = None
    denoise_shift: float | None = None
    guidance_until: float | None = None

    @property
    def pictures(self) -> bool:
        """Whether pictures go in or may come out."""
        return bool(self.images) or self.ask(images=(), seed=0).draws

    def ask(
        self,
        *,
        images: Sequence[NDArray[np.integer]],
        seed: int,
        earlier: Sequence[Turn] = (),
    ) -> Ask:
        """The wish in the engine's terms, its references as codes [H, W]."""
        return Ask(
            task=self.task,
            question=self.prompt,
            images=tuple(images),
            earlier=tuple(earlier),
            size=self.size,
            ratio=self.ratio,
            guidance=self.guidance,
            text=self.text,
            visual=self.visual,
            seed=seed,
            max_new_tokens=self.max_new_tokens,
            steps=self.steps,
            stop=self.stop,
            denoise=denoise_options(
                self.decoder,
                steps=self.denoise_steps,
                sampler=self.sampler,
                shift=self.denoise_shift,
                guidance_until=self.guidance_until,
            ),
        )

    def problems(self) -> list[str]:
        """What is wrong with it before any file but the references' names is looked at."""
        missing = [f"image {path} does not exist" for path in self.images if not path.is_file()]
        unread = [_UNREAD] * len(self.images)
        return [*missing, *self.ask(images=unread, seed=self.seed).problems()]


_UNREAD = np.zeros((1, 1), dtype=np.int64)
"""Stands for a reference whose codes are not known yet."""


def wish_of(options: GenerateOptions, *, prompt: str, where: str) -> Wish:
    """A prompt for which everything is as the call says."""
    return Wish(
        prompt=prompt,
        where=where,
        task=options.task,
        images=tuple(options.images),
        size=options.size,
        ratio=options.ratio,
        guidance=options.guidance,
        text=options.text,
        visual=options.visual,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        steps=options.steps,
        stop=tuple(options.stop),
        decoder=options.decoder,
        denoise_steps=options.denoise_steps,
        sampler=options.sampler,
        denoise_shift=options.denoise_shift,
        guidance_until=options.guidance_until,
    )


def call_problems(options: GenerateOptions) -> list[str]:
    """What is wrong with the call itself, whatever it asks for."""
    problems: list[str] = []
    for name, value in (
        ("batch_size", options.batch_size),
        ("image_area", options.image_area),
        ("cache_tokens", options.cache_tokens),
    ):
        if value is not None and value < 1:
            problems.append(f"{name}={value} is too small; use at least 1")
    parallel = {
        "denoise_steps": options.denoise_steps,
        "sampler": options.sampler,
        "denoise_shift": options.denoise_shift,
        "guidance_until": options.guidance_until,
    }
    if options.prompts_file is None:  # whose records may choose another decoder
        problems += stray_numbers(options.decoder, parallel)
    if options.out.exists() and not options.out.is_dir():
        problems.append(f"out={options.out} is a file; name a folder")
    return problems


def gathered(found: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """The problems of many prompts, each said once: (what messages call the prompt, its problems).
    What is wrong with all of them is wrong with the call, so no prompt is named."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for where, problems in found:
        for problem in problems:
            places[problem].append(where)
    lines: list[str] = []
    for problem, where in places.items():
        if len(where) == len(found):
            lines.append(problem)
            continue
        more = f" and {len(where) - _SHOWN} more" if len(where) > _SHOWN else ""
        lines.append(f"{', '.join(where[:_SHOWN])}{more}: {problem}")
    return lines
