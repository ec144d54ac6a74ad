"""What goes into the engine and what comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu35.dida.samplers import Sampler
from emu35.inference.grammar import MAX_DIGITS, GrammarOptions, NextKind
from emu35.inference.sampler import EVERYTHING, sampling_problems
from emu35.tokens.document import Document
from emu35.tokens.template import Sampling

MOST_TOP_LOGPROBS = 20
"""Candidates a token may be reported with, as in OpenAI's interface."""

MOST_GUIDANCE = 1e3
"""Beyond it fp32 scores overflow; useful scales are below 20."""


def guidance_problems(guidance: float) -> list[str]:
    """What is wrong with ``guidance``, as sentences."""
    if abs(guidance) <= MOST_GUIDANCE:
        return []
    return [f"guidance={guidance} must lie in +-{MOST_GUIDANCE:g}; 1 turns it off"]


class Decoder(StrEnum):
    """How pictures are decoded: token by token, or all codes at once in a few steps."""

    ar = "ar"
    dida = "dida"


MOST_STEPS = 1000
"""Of denoising: beyond a hundred hardly anything changes."""

MOST_SHIFT = 100
"""Beyond it all steps but the last stand at the noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseOptions:
    """How pictures are decoded in parallel (:mod:`emu35.dida`).

    Every picture takes ``steps`` forwards at most, whatever its size. Guidance stops once the time,
    which goes from 0 (noise) to 1, has come to ``guidance_until``: what is left are details, and
    the steps take half the work. ``shift`` above 1 spends more of the steps near the noise.
    """

    sampler: Sampler = Sampler.kinetic_euler
    steps: int = 25
    guidance_until: float = 0.9
    shift: float = 1.0

    def problems(self) -> list[str]:
        """Everything that makes no sense, as sentences."""
        found: list[str] = []
        if not 1 <= self.steps <= MOST_STEPS:
            found.append(f"denoise steps={self.steps} must lie in 1..{MOST_STEPS}")
        if not 0 <= self.guidance_until <= 1:
            found.append(
                f"guidance_until={self.guidance_until} is a time and must lie in 0..1; "
                "1 guides every step"
            )
        if not 0 < self.shift <= MOST_SHIFT:
            found.append(f"denoise shift={self.shift} must be positive and at most {MOST_SHIFT}")
        return found


def stray_numbers(decoder: Decoder, said: Mapping[str, object]) -> list[str]:
    """A sentence where numbers of parallel decoding are said to a decoder that knows none."""
    names = [name for name, value in said.items() if value is not None]
    if decoder is not Decoder.ar or not names:
        return []
    verb = "holds" if len(names) == 1 else "hold"
    return [
        f"{' and '.join(names)} {verb} for parallel decoding, but decoder is ar; ask for decoder "
        "dida, or leave them out"
    ]


def denoise_options(
    decoder: Decoder,
    *,
    steps: int | None,
    sampler: Sampler | None,
    shift: float | None = None,
    guidance_until: float | None = None,
) -> DenoiseOptions | None:
    """What a request of ``decoder`` says; None of a number takes the default. The numbers of dida
    mean nothing to ar."""
    if decoder is Decoder.ar:
        return None
    said: dict[str, Any] = {
        "steps": steps,
        "sampler": sampler,
        "shift": shift,
        "guidance_until": guidance_until,
    }
    return DenoiseOptions(**{name: value for name, value in said.items() if value is not None})


class Finish(StrEnum):
    """Why a sequence ended."""

    eos = "eos"
    images = "images"  # max_images are complete
    length = "length"  # max_new_tokens; never inside an image
    stop = "stop"  # the text contains one of the stop strings
    abort = "abort"  # somebody asked for it; an image may be cut short


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to generate.

    ``unconditional`` is the prompt of the second stream and needed only where ``guidance``
    differs from 1. ``visual`` also samples the digits of a free grid size. The sequence ends behind
    ``max_images`` images (0: no limit), and with the token that completes one of the strings
    ``stop`` within a stretch of text; that token is part of the answer. ``top_logprobs`` asks for
    so many of the best candidates beside each sampled token (none beside codes decoded in
    parallel), ``keep_candidates`` for the ids that top-k and top-p left, where they did not
    leave all. ``denoise`` decodes pictures in parallel, by an engine that can; None token by token.
    Equal requests with equal seeds give equal tokens.
    """

    prompt: Sequence[int]
    unconditional: Sequence[int] = ()
    grammar: GrammarOptions = field(default_factory=GrammarOptions)
    text: Sampling = EVERYTHING
    visual: Sampling = EVERYTHING
    guidance: float = 1.0
    seed: int = 0
    max_new_tokens: int = 5120
    max_images: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    keep_candidates: bool = False
    denoise: DenoiseOptions | None = None

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional stream at all; text alone is never guided."""
        return self.guidance != 1.0 and self.grammar.images

    @property
    def prompts(self) -> list[Sequence[int]]:
        """What its streams begin with: one, or with guidance two."""
        return [self.prompt, self.unconditional] if self.guided else [self.prompt]

    @property
    def slots(self) -> int:
        """Cache slots that the longer stream can fill."""
        return max(map(len, self.prompts)) + self.max_new_tokens

    def problems(self) -> list[str]:
        """Everything that keeps the request from being run, as sentences."""
        found = [
            *sampling_problems(self.text, name="text"),
            *sampling_problems(self.visual, name="image"),
            *guidance_problems(self.guidance),
            *(self.denoise.problems() if self.denoise else ()),
        ]
        if not self.prompt:
            found.append("the prompt has no tokens; a sequence starts with at least BOS")
        if self.guided and not self.unconditional:
            found.append(
                f"guidance {self.guidance} needs an unconditional prompt; give one, or guidance 1"
            )
        for name, value, lowest in (
            ("max_new_tokens", self.max_new_tokens, 1),
            ("max_images", self.max_images, 0),
            ("top_logprobs", self.top_logprobs, 0),
        ):
            if value < lowest:
                found.append(f"{name}={value} must be at least {lowest}")
        if self.top_logprobs > MOST_TOP_LOGPROBS:
            found.append(f"top_logprobs={self.top_logprobs} must be at most {MOST_TOP_LOGPROBS}")
        if not -(2**63) <= self.seed < 2**63:
            found.append(f"seed={self.seed} must fit 64 bits; use one from 0 to 2^63 - 1")
        if "" in self.stop:
            found.append("a stop string is empty; it would end every text before it begins")
        return [*found, *self._image_problems()]

    def _image_problems(self) -> list[str]:
        options = self.grammar
        if not options.images:
            if options.open_image or self.max_images:
                return ["images=False forbids what open_image or max_images asks for; drop one"]
            return []
        if not 1 <= options.min_digits <= MAX_DIGITS:
            return [f"min_digits={options.min_digits} must lie in 1..{MAX_DIGITS}"]
        smallest = options.smallest
        if min(smallest.height, smallest.width) < 1:
            return [f"an image of {smallest} codes has none; use at least 1*1"]
        if (options.open_image or options.size) and smallest.image_tokens > self.max_new_tokens:
            return [
                f"an image of {smallest} codes has {smallest.image_tokens} tokens, but "
                f"max_new_tokens={self.max_new_tokens}; allow more tokens or use a smaller size"
            ]
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One generated token and how it came to be.

    ``logprob`` is the logarithm of the probability with which the behaviour policy (guidance,
    legal set, temperature, top-k, top-p) chose ``id`` among ``support`` candidates; 0 where the
    grammar ``forced`` it. Greedy choices (temperature 0), which have no density, report that of
    temperature 1 over the legal set. ``top`` lists ids and log-probabilities of the best
    candidates, best first, where the request asks for them; ``candidates`` all their ids, int32 and
    ascending, where it asks for these and not everything legal was one. It takes no part in
    comparisons. A ``support`` of 0 is unknown: the server that drew the token does not say.

    A code that was ``denoised`` was drawn together with the others of its picture: ``logprob`` is
    that of its last draw given the canvas at that step, not given the tokens before it.
    """

    id: int
    kind: NextKind
    logprob: float = 0.0
    support: int = 1
    top: tuple[tuple[int, float], ...] = ()
    denoised: bool = False
    candidates: NDArray[np.int32] | None = field(default=None, compare=False)

    @property
    def forced(self) -> bool:
        """Whether the grammar left no choice: no gradient may come from such a token."""
        return self.kind is NextKind.FORCED


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """The answer to request number ``index`` (in order of submission): every generated token, EOS
    included, and the same as text and images. ``document.problems`` names what is no image: one cut
    short by an abort, or stray layout tokens where the request permits them."""

    index: int
    tokens: list[Token]
    document: Document
    finish: Finish

    @property
    def ids(self) -> list[int]:
        """The ids alone."""
        return [token.id for token in self.tokens]


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What one step of the engine did for request ``index``: new tokens, and the whole answer with
    the last of them."""

    index: int
    tokens: list[Token]
    finished: Generated | None = None
