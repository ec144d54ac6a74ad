"""Draws prompts with an engine and judges the pictures, with what they cost.

    opened = open_evaluation(Path("runs/demo/dida"), prompts=prompts, asking=asking)
    row = evaluate_decoder(opened.engine, prompts, decoding=Decoding(), asking=asking,
                           codec=opened.codec)
    row.quality.accuracy.value, row.forwards, row.seconds

Prompts are drawn in batches of ``asking.batch_size``, one after another, so that times are those of
a full batch (but for the last one), after a few steps whose work is thrown away.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emu35.checkpoint.codec import open_codec
from emu35.checkpoint.source import Described, load_model
from emu35.config import Precision
from emu35.data.scenes.quality import ScenePrompt, SceneQuality, read_pictures, summarise
from emu35.inference.ask import Ask, SamplingOverride, build_request, prompt_seed
from emu35.inference.denoiser import needed_denoiser
from emu35.inference.engine import Engine
from emu35.inference.grammar import GridSize
from emu35.inference.lead import build_engine
from emu35.inference.memory import cache_tokens
from emu35.inference.request import DenoiseOptions, Request
from emu35.stages.picture_features import Picture
from emu35.tokens.template import PromptTemplate, Task
from emu35.tokens.text import TextTokenizer, build_text_tokenizer
from emu35.vision.codec import ImageCodec, decode_grids
from emu35.vision.resize import to_image

WARM_STEPS = 4
"""Of the engine, before the clock starts: prompts are read and the first codes drawn."""

Codes = NDArray[np.integer]
"""Of one picture, [H, W]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How every prompt is asked, whoever decodes: None is what the task recommends. ``template``
    and ``max_positions`` are facts of the model."""

    template: PromptTemplate
    max_positions: int
    size: GridSize
    guidance: float | None = None
    temperature: float | None = None
    text_temperature: float | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """A decoder: token by token, or in parallel by ``denoise``. ``again`` > 0 draws with other
    seeds than 0 does; the decoders of one ``again`` share theirs."""

    denoise: DenoiseOptions | None = None
    again: int = 0

    @property
    def name(self) -> str:
        """``ar``, ``ar_again_1``, ``kinetic_euler_25``: fit for a file."""
        base = f"{self.denoise.sampler}_{self.denoise.steps}" if self.denoise else "ar"
        return f"{base}_again_{self.again}" if self.again else base


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """What came of the prompts, in their order: codes [H, W], None where no picture came.

    ``forwards`` are those of the engine while the prompt was in flight, those for text before the
    picture among them; ``tokens`` were fed in all of them together, by both streams where there is
    guidance. ``seconds`` are wall time, ``cpu_seconds`` what this process computed on all its
    cores, which others on the machine disturb less.
    """

    codes: list[Codes | None]
    forwards: list[int]
    tokens: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderRow:
    """A decoder in figures, of one picture on average: ``forwards`` (``most_forwards`` at worst),
    ``tokens`` fed, ``seconds`` and ``cpu_seconds`` in a batch of ``batch_size``. ``codes`` are as
    :class:`Drawn` has them."""

    name: str
    sampler: str | None
    steps: int | None
    again: int
    batch_size: int
    forwards: float
    most_forwards: int
    tokens: float
    seconds: float
    cpu_seconds: float
    quality: SceneQuality
    codes: list[Codes | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A model that prompts can be drawn with."""

    engine: Engine
    codec: ImageCodec
    tokenizer: TextTokenizer


def open_evaluation(
    described: Described,
    *,
    prompts: Sequence[ScenePrompt],
    asking: Asking,
    vision: Path | None = None,
    precision: Precision | None = None,
) -> Opened:
    """The engine that draws ``prompts`` in any way, and the image tokenizer.

    Raises:
        ConfigError: the model was not adapted to parallel decoding, ``vision`` is not there, or a
            prompt does not fit (each is named).
        CheckpointError, ReleaseError, TokenizerError: the source cannot be opened.
    """
    source = needed_denoiser(described, chosen=vision)
    codec = open_codec(described, chosen=vision)
    tokenizer = build_text_tokenizer(described.tokenizer)
    requests = build_requests(prompts, decoding=Decoding(), asking=asking, tokenizer=tokenizer)
    model = load_model(described, precision=precision or described.precision)
    at_once = min(asking.batch_size, len(requests))
    longest = max(request.slots for request in requests)
    engine = build_engine(
        model=model,
        tokenizer=tokenizer,
        source=source,
        max_requests=at_once,
        max_length=longest,
        cache_tokens=cache_tokens(requests, model=model, at_once=at_once),
        # All prompts and canvases of a batch share a forward: what is counted is what each takes.
        prefill_chunk=2 * at_once * longest,
        canvas_chunk=2 * at_once * longest,
    )
    return Opened(engine=engine, codec=codec, tokenizer=tokenizer)


def build_requests(
    prompts: Sequence[ScenePrompt], *, decoding: Decoding, asking: Asking, tokenizer: TextTokenizer
) -> list[Request]:
    """One request a prompt.

    Raises:
        ConfigError: one does not fit the model, or a number makes no sense.
    """
    return [
        build_request(
            Ask(
                task=Task.t2i,
                question=prompt.prompt,
                size=asking.size,
                guidance=asking.guidance,
                text=SamplingOverride(temperature=asking.text_temperature),
                visual=SamplingOverride(temperature=asking.temperature),
                seed=prompt_seed(asking.seed + decoding.again, index=index),
                max_new_tokens=asking.max_new_tokens,
                denoise=decoding.denoise,
            ),
            tokenizer=tokenizer,
            template=asking.template,
            max_positions=asking.max_positions,
        )
        for index, prompt in enumerate(prompts)
    ]


def evaluate_decoder(
    engine: Engine,
    prompts: Sequence[ScenePrompt],
    *,
    decoding: Decoding,
    asking: Asking,
    codec: ImageCodec,
) -> DecoderRow:
    """Draw every prompt and judge the pictures. The engine must be idle.

    Raises:
        ConfigError: as :func:`build_requests`, and for parallel decoding with an engine of a model
            that was not adapted to it.
    """
    requests = build_requests(prompts, decoding=decoding, asking=asking, tokenizer=engine.tokenizer)
    warm_up(engine, requests[: asking.batch_size])
    drawn = draw(engine, requests, batch_size=asking.batch_size)
    pictures = pictures_of(drawn.codes, codec=codec)
    readings = read_pictures(pictures, scenes=[prompt.scene for prompt in prompts])
    return DecoderRow(
        name=decoding.name,
        sampler=str(decoding.denoise.sampler) if decoding.denoise else None,
        steps=decoding.denoise.steps if decoding.denoise else None,
        again=decoding.again,
        batch_size=min(asking.batch_size, len(prompts)),
        forwards=sum(drawn.forwards) / len(prompts),
        most_forwards=max(drawn.forwards),
        tokens=drawn.tokens / len(prompts),
        seconds=drawn.seconds / len(prompts),
        cpu_seconds=drawn.cpu_seconds / len(prompts),
        quality=summarise(
            [reading.score for reading in readings],
            pictures=sum(picture is not None for picture in pictures),
        ),
        codes=drawn.codes,
    )


def warm_up(engine: Engine, requests: Sequence[Request]) -> None:
    """Begin ``requests`` and drop them: what is made at first use is then there."""
    indices = [engine.submit(request) for request in requests]
    for _ in range(WARM_STEPS):
        if engine.busy:
            engine.step()
    for index in indices:
        engine.abort(index)


def draw(engine: Engine, requests: Sequence[Request], *, batch_size: int) -> Drawn:
    """Run ``requests``, ``batch_size`` of them at a time."""
    codes: list[Codes | None] = []
    forwards: list[int] = []
    fed = engine.stats.tokens_fed
    began, computed = time.perf_counter(), time.process_time()
    for first in range(0, len(requests), batch_size):
        flight = {
            engine.submit(request): at
            for at, request in enumerate(requests[first : first + batch_size])
        }
        codes += [None] * len(flight)
        forwards += [0] * len(flight)
        while engine.busy:
            before = engine.stats.forwards
            updates = engine.step()
            made = engine.stats.forwards - before
            for at in flight.values():
                forwards[first + at] += made
            for update in updates:
                if update.finished is not None:
                    images = update.finished.document.images
                    codes[first + flight.pop(update.index)] = images[0] if images else None
    return Drawn(
        codes=codes,
        forwards=forwards,
        tokens=engine.stats.tokens_fed - fed,
        seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - computed,
    )


def pictures_of(codes: Sequence[Codes | None], *, codec: ImageCodec) -> list[Picture | None]:
    """Pictures [H, W, 3] of codes, None where there are none."""
    drawn = decode_grids(codec, [codes_HW for codes_HW in codes if codes_HW is not None])
    pictures = (np.asarray(to_image(pixels_3HW)) for pixels_3HW in drawn)
    return [None if codes_HW is None else next(pictures) for codes_HW in codes]
