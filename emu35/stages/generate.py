"""Generation: prompts to pictures and text, from a run folder or a release folder alike.

Everything that can be wrong with the request is checked before weights are read. Each finished
prompt is written at once, so an interrupted call keeps what it has made::

    OUT/000_prompt.txt  000_00_image.png  000_01_image.png ...  000_text.txt
        results.jsonl      one row a prompt: ids, seed, sizes, files, what was cut short

The same seed gives the same tokens whatever the batch size: every prompt has a random generator of
its own, seeded by (seed, index of the prompt).
"""

import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from emu35.checkpoint.source import Described, describe, load_model
from emu35.config import Precision
from emu35.errors import ConfigError, DataError
from emu35.inference.engine import Engine
from emu35.inference.grammar import GrammarOptions, GridSize
from emu35.inference.request import Generated, Request
from emu35.inference.sampler import sampling_problems
from emu35.log.console import Console, human_count, human_time
from emu35.parallel.mesh import local_device
from emu35.stages.generated_files import GeneratedFiles
from emu35.tokens.template import (
    ASPECT_RATIOS,
    TASKS,
    PromptTemplate,
    Sampling,
    Task,
    TaskNumbers,
    build_prompt,
)
from emu35.tokens.text import TextTokenizer, build_text_tokenizer
from emu35.vision.codec import ImageCodec, load_codec
from emu35.vision.resize import RejectedImage, open_image, to_pixels

_REPORT_SECONDS = 10.0
"""Between two lines of progress where there is no terminal to redraw."""


@dataclass(kw_only=True, slots=True)
class SamplingOverride:
    """What to change of a task's recommended numbers; None keeps them."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def apply(self, numbers: Sampling) -> Sampling:
        """``numbers`` with the changes."""
        return Sampling(
            temperature=numbers.temperature if self.temperature is None else self.temperature,
            top_k=numbers.top_k if self.top_k is None else self.top_k,
            top_p=numbers.top_p if self.top_p is None else self.top_p,
        )


@dataclass(kw_only=True, slots=True)
class GenerateOptions:
    """One call of ``emu35 generate``.

    ``source`` is a run or a release; ``vision`` overrides its image tokenizer. None everywhere
    else means: what the task recommends, what the model was trained for (``template``), or, for
    the grid, the last reference's size, else the model's own choice. ``size`` counts codes,
    ``ratio`` is a name such as 16:9, ``image_area`` (pixels) is what references are resized to.
    ``images`` are references shared by every prompt. ``batch_size`` counts prompts in flight.
    """

    source: Path
    prompts: Sequence[str]
    out: Path
    task: Task = Task.t2i
    images: Sequence[Path] = ()
    vision: Path | None = None
    template: PromptTemplate | None = None
    step: int | None = None
    precision: Precision | None = None
    seed: int = 0
    size: GridSize | None = None
    ratio: str | None = None
    image_area: int | None = None
    guidance: float | None = None
    text: SamplingOverride = field(default_factory=SamplingOverride)
    visual: SamplingOverride = field(default_factory=SamplingOverride)
    max_new_tokens: int | None = None
    batch_size: int = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateResult:
    """What came of a call. ``problems`` has one line for everything that is no image or text."""

    answers: list[Generated]
    images: int
    tokens: int
    seconds: float
    problems: list[str]


def generate(options: GenerateOptions) -> GenerateResult:
    """Generate an answer to every prompt and write it below ``options.out``.

    Raises:
        ConfigError: options that make no sense, all of them named.
        DataError: a reference image that cannot be used, or an output that cannot be written.
        CheckpointError, ReleaseError, TokenizerError: a source that cannot be opened.
    """
    check(options)
    console = Console(stream=sys.stderr)
    described = describe(options.source, step=options.step, message=console.line)
    codec = open_codec(options, described=described)
    tokenizer = build_text_tokenizer(described.tokenizer)
    requests = build_requests(
        options,
        described=described,
        tokenizer=tokenizer,
        references=encode_references(options, codec=codec),
    )
    files = GeneratedFiles(
        folder=options.out, prompts=options.prompts, seed=options.seed, codec=codec
    )
    engine = Engine(
        model=load_model(described, precision=options.precision or described.precision),
        tokenizer=tokenizer,
        max_requests=min(options.batch_size, len(requests)),
        max_length=max(request.slots for request in requests),
    )
    for request in requests:
        engine.submit(request)
    return _run(engine, files=files, console=console, requests=requests)


def parse_size(text: str) -> GridSize:
    """A grid such as ``64*48`` or ``64x48``, height first, in codes.

    Raises:
        ConfigError: if it is none.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,3})[*x]([1-9][0-9]{0,3})", text.strip())
    if match is None:
        raise ConfigError(f"size {text!r} is no grid; write HEIGHTxWIDTH in codes, such as 64x48")
    return GridSize(height=int(match[1]), width=int(match[2]))


def check(options: GenerateOptions) -> None:
    """Refuse options that no source could satisfy.

    Raises:
        ConfigError: naming every problem.
    """
    numbers = TASKS[options.task]
    problems = [
        *sampling_problems(options.text.apply(numbers.text), name="text"),
        *sampling_problems(options.visual.apply(numbers.image), name="image"),
    ]
    if not options.prompts:
        problems.append("there is no prompt; give at least one")
    for index, prompt in enumerate(options.prompts):
        if not prompt.strip():
            problems.append(f"prompt {index} is empty; write what should be generated")
    for name, value, lowest in (
        ("batch_size", options.batch_size, 1),
        ("max_new_tokens", options.max_new_tokens, 1),
        ("image_area", options.image_area, 1),
        ("seed", options.seed, 0),
    ):
        if value is not None and value < lowest:
            problems.append(f"{name}={value} is too small; use at least {lowest}")
    if options.guidance is not None and not math.isfinite(options.guidance):
        problems.append(f"guidance={options.guidance} must be a number; 1 turns it off")
    if options.ratio is not None and options.ratio not in ASPECT_RATIOS:
        known = ", ".join(ASPECT_RATIOS)
        problems.append(f"ratio {options.ratio!r} is unknown; use one of {known}, or give a size")
    if options.ratio is not None and options.size is not None:
        problems.append("size and ratio both fix the grid; give one of them")
    if options.task is Task.x2i and not options.images:
        problems.append("task x2i starts from reference images; give at least one, or use t2i")
    problems += [f"image {path} does not exist" for path in options.images if not path.is_file()]
    if options.out.exists() and not options.out.is_dir():
        problems.append(f"out={options.out} is a file; name a folder")
    if problems:
        raise ConfigError(problems)


def open_codec(options: GenerateOptions, *, described: Described) -> ImageCodec:
    """The image tokenizer that the model's codes belong to.

    Raises:
        ConfigError: there is none, or its codebook is another one.
    """
    folder = options.vision or described.vision_folder
    if folder is None:
        raise ConfigError(
            f"{options.source} names no image tokenizer, so its codes cannot become pictures; "
            "give its folder with vision=FOLDER (config.yaml and model.ckpt)"
        )
    if not folder.is_dir():
        raise ConfigError(
            f"image tokenizer {folder} does not exist; "
            "give its folder with vision=FOLDER (config.yaml and model.ckpt)"
        )
    codec = load_codec(folder, device=local_device())
    codes = described.tokenizer.codebook_size
    if codec.codebook_size != codes:
        raise ConfigError(
            f"image tokenizer {folder} has {codec.codebook_size} codes, but the language model "
            f"has {codes}; use the one that its data was made with"
        )
    return codec


def encode_references(options: GenerateOptions, *, codec: ImageCodec) -> list[np.ndarray]:
    """Codes [H, W] of every reference image.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    area = options.image_area or TASKS[options.task].image_area
    grids: list[np.ndarray] = []
    for path in options.images:
        try:
            pixels_3HW = to_pixels(open_image(path), area=area, factor=codec.factor)
        except RejectedImage as error:
            raise DataError(f"reference image {path}: {error}") from error
        grids.append(codec.encode(torch.from_numpy(pixels_3HW)[None])[0].cpu().numpy())
    return grids


def build_requests(
    options: GenerateOptions,
    *,
    described: Described,
    tokenizer: TextTokenizer,
    references: Sequence[np.ndarray],
) -> list[Request]:
    """One request a prompt, with the task's numbers wherever the options leave them.

    Raises:
        ConfigError: if an answer cannot fit the model's positions.
    """
    numbers = TASKS[options.task]
    template = options.template or described.template
    grammar = _grammar(options, numbers=numbers, template=template, references=references)
    guidance = numbers.guidance if options.guidance is None else options.guidance
    prompts = [
        build_prompt(
            options.task, prompt, images=references, tokenizer=tokenizer, template=template
        )
        for prompt in options.prompts
    ]
    longest = max(max(len(p.conditional), len(p.unconditional)) for p in prompts)
    budget = _budget(
        options,
        numbers=numbers,
        grammar=grammar,
        room=described.config.max_position_embeddings - longest,
    )
    return [
        Request(
            prompt=prompt.conditional,
            unconditional=prompt.unconditional,
            grammar=grammar,
            text=options.text.apply(numbers.text),
            visual=options.visual.apply(numbers.image),
            guidance=guidance,
            seed=prompt_seed(options.seed, index=index),
            max_new_tokens=budget,
            max_images=1 if numbers.one_image else 0,
        )
        for index, prompt in enumerate(prompts)
    ]


def prompt_seed(seed: int, *, index: int) -> int:
    """The seed of prompt ``index``: mixed, so that neighbouring seeds share no noise."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)


def _grammar(
    options: GenerateOptions,
    *,
    numbers: TaskNumbers,
    template: PromptTemplate,
    references: Sequence[np.ndarray],
) -> GrammarOptions:
    size = options.size
    if options.ratio is not None:
        shape = ASPECT_RATIOS[options.ratio]
        size = GridSize(height=shape[0], width=shape[1]) if shape else None
    elif size is None and references:
        height, width = references[-1].shape
        size = GridSize(height=height, width=width)
    # A plain prompt is the beginning of a pretraining document, in which nothing asks for an
    # image; and models trained like that are small ones, of small pictures, as often as not.
    plain = template is PromptTemplate.plain
    return GrammarOptions(
        size=size, open_image=plain and numbers.one_image, min_digits=1 if plain else 2
    )


def _budget(
    options: GenerateOptions, *, numbers: TaskNumbers, grammar: GrammarOptions, room: int
) -> int:
    """Tokens that an answer may have, ``room`` being what the model's positions leave."""
    image = grammar.size.image_tokens if grammar.size else 0
    if options.max_new_tokens is not None:
        budget, source = options.max_new_tokens, "max_new_tokens"
    elif grammar.open_image and image:
        budget, source = image, "the size"
    else:
        budget, source = min(numbers.max_new_tokens, max(room, 1)), "the task"
    problems: list[str] = []
    if budget > room:
        problems.append(
            f"the prompt leaves {max(room, 0)} of the model's positions, but {source} needs "
            f"{budget}; ask for less (size, max_new_tokens) or shorten the prompt (image_area)"
        )
    if image > budget:
        problems.append(
            f"an image of {grammar.size} codes has {image} tokens, but only {budget} may be "
            "generated; use a smaller size or a larger max_new_tokens"
        )
    if problems:
        raise ConfigError(problems)
    return budget


def _run(
    engine: Engine, *, files: GeneratedFiles, console: Console, requests: Sequence[Request]
) -> GenerateResult:
    answers: list[Generated] = []
    progress = _Progress(console=console, requests=requests)
    try:
        while engine.busy:
            finished = [update.finished for update in engine.step() if update.finished]
            files.write(finished)
            answers += finished
            progress.show(done=len(answers), tokens=engine.stats.tokens_generated)
    finally:
        # What is done is done, also when the rest was interrupted.
        files.finish()
        console.close()
    answers.sort(key=lambda answer: answer.index)
    result = GenerateResult(
        answers=answers,
        images=sum(len(answer.document.images) for answer in answers),
        tokens=engine.stats.tokens_generated,
        seconds=progress.seconds,
        problems=[f"prompt {a.index}: {p}" for a in answers for p in a.document.problems],
    )
    for problem in result.problems:
        console.line(problem)
    console.line(
        f"{len(answers)} prompts, {result.images} images, {result.tokens} tokens in "
        f"{human_time(result.seconds)} -> {files.folder}"
    )
    return result


class _Progress:
    """Prompts done, rate and the longest time that can remain."""

    def __init__(self, *, console: Console, requests: Sequence[Request]) -> None:
        self._console = console
        self._prompts = len(requests)
        self._most_tokens = sum(request.max_new_tokens for request in requests)
        self._started = self._reported = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def show(self, *, done: int, tokens: int) -> None:
        rate = tokens / max(self.seconds, 1e-9)
        remaining = (self._most_tokens - tokens) / max(rate, 1e-9)
        text = (
            f"generate  {done}/{self._prompts} prompts  {human_count(rate)} tokens/s  "
            f"at most {human_time(remaining)} left"
        )
        self._console.progress(text)
        if not self._console.live and time.perf_counter() - self._reported > _REPORT_SECONDS:
            self._console.line(text)
            self._reported = time.perf_counter()
