"""From a user's wish to a request: the one way that the command line and the server share.

An :class:`Ask` says what is wanted in a user's terms: a task, a question, pictures (as codes), the
turns before, and whatever of the task's numbers should change. :func:`build_request` turns it into
ids, grammar and limits, or names everything that is wrong with it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from emu35.errors import ConfigError, Emu35Error
from emu35.inference.grammar import GrammarOptions, GridSize
from emu35.inference.request import (
    MOST_TOP_LOGPROBS,
    DenoiseOptions,
    Request,
    guidance_problems,
)
from emu35.inference.sampler import sampling_problems
from emu35.tokens.document import Image
from emu35.tokens.serialize import image_tokens, split_parts
from emu35.tokens.template import (
    ASPECT_RATIOS,
    TASKS,
    PromptTemplate,
    Sampling,
    Task,
    TaskNumbers,
    Turn,
    answer_ids,
    build_prompt,
    image_ids,
)
from emu35.tokens.text import TextTokenizer

__all__ = [
    "MAX_REFERENCES",
    "Ask",
    "SamplingOverride",
    "Turn",
    "build_request",
    "parse_size",
    "prompt_seed",
]

MAX_REFERENCES = 16
"""Reference images of one dialogue, all turns together. The release was tuned on up to three."""

MAX_STOPS = 16
"""Stop strings of one request; each is looked for at every token."""

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ask:
    """One wish. None everywhere means: what the task recommends.

    ``images`` are the references [H, W] of this question, ``earlier`` the turns before it (with
    references of their own). ``size`` counts codes and ``ratio`` names one of
    :data:`~emu35.tokens.template.ASPECT_RATIOS`; without both, pictures are as large as the last
    one of the dialogue, and where there is none the model chooses. ``steps`` is the number of
    pictures after which the answer ends; a chat answers in text alone unless ``size``, ``ratio`` or
    ``steps`` asks for pictures. ``denoise`` decodes pictures in parallel. ``stop`` are strings that
    end the answer, ``top_logprobs`` the alternatives to list with each token.
    """

    task: Task
    question: str
    images: tuple[NDArray[np.integer], ...] = ()
    earlier: tuple[Turn, ...] = ()
    size: GridSize | None = None
    ratio: str | None = None
    guidance: float | None = None
    text: SamplingOverride = field(default_factory=SamplingOverride)
    visual: SamplingOverride = field(default_factory=SamplingOverride)
    seed: int = 0
    max_new_tokens: int | None = None
    steps: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    denoise: DenoiseOptions | None = None

    @property
    def numbers(self) -> TaskNumbers:
        """The recommended numbers of the task."""
        return TASKS[self.task]

    @property
    def references(self) -> int:
        """Reference images of all turns."""
        return len(self.images) + sum(len(turn.images) for turn in self.earlier)

    @property
    def draws(self) -> bool:
        """Whether the answer may hold pictures."""
        asked = self.size is not None or self.ratio is not None or self.steps is not None
        return self.numbers.images or asked

    def problems(self) -> list[str]:
        """Everything that no model and no tokenizer could make right, as sentences."""
        return [*self._wrong_question(), *self._wrong_grid(), *self._wrong_numbers()]

    def _wrong_question(self) -> Iterator[str]:
        if not self.question.strip():
            yield "the prompt is empty; write what should be generated"
        given = self.references
        if given > MAX_REFERENCES:
            yield (
                f"{given} reference images are too many; a dialogue takes at most "
                f"{MAX_REFERENCES}, all turns together"
            )

    def _wrong_grid(self) -> Iterator[str]:
        if self.ratio is not None and self.ratio not in ASPECT_RATIOS:
            known = ", ".join(ASPECT_RATIOS)
            yield f"ratio {self.ratio!r} is unknown; use one of {known}, or give a size"
        if self.ratio is not None and self.size is not None:
            yield "size and ratio both fix the grid; give one of them"
        if self.size is not None and min(self.size.height, self.size.width) < 1:
            yield f"size {self.size} is no grid; a picture has at least 1*1 codes"
        if self.steps is not None and self.numbers.one_image and self.steps > 1:
            yield (
                f"steps={self.steps}, but task {self.task.value} is one image; use story, howto "
                "or explore, or ask several times with different seeds"
            )

    def _wrong_numbers(self) -> Iterator[str]:
        yield from sampling_problems(self.text.apply(self.numbers.text), name="text")
        yield from sampling_problems(self.visual.apply(self.numbers.image), name="image")
        for name, value in (("max_new_tokens", self.max_new_tokens), ("steps", self.steps)):
            if value is not None and value < 1:
                yield f"{name}={value} is too small; use at least 1"
        if not 0 <= self.seed <= LARGEST_SEED:
            yield f"seed={self.seed} must lie in 0..{LARGEST_SEED}"
        if self.guidance is not None:
            yield from guidance_problems(self.guidance)
        if self.denoise is not None:
            yield from self.denoise.problems()
        if len(self.stop) > MAX_STOPS:
            yield f"{len(self.stop)} stop strings are too many; give at most {MAX_STOPS}"
        if not all(self.stop):
            yield "a stop string is empty and would end every answer at once; drop it"
        if not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            yield f"top_logprobs={self.top_logprobs} must lie in 0..{MOST_TOP_LOGPROBS}"


def build_request(
    ask: Ask, *, tokenizer: TextTokenizer, template: PromptTemplate, max_positions: int
) -> Request:
    """The request of ``ask`` for a model of ``max_positions`` positions that was trained on prompts
    in the form of ``template``.

    Raises:
        ConfigError: naming every problem.
    """
    problems = [*ask.problems(), *_wrong_codes(ask, tokenizer=tokenizer)]
    if problems:
        raise ConfigError(problems)
    numbers = ask.numbers
    prompt = build_prompt(
        ask.task,
        ask.question,
        images=ask.images,
        earlier=ask.earlier,
        tokenizer=tokenizer,
        template=template,
    )
    grammar = _grammar(ask, template=template, tokenizer=tokenizer)
    guidance = numbers.guidance if ask.guidance is None else ask.guidance
    used = max(len(prompt.conditional), len(prompt.unconditional) if guidance != 1.0 else 0)
    request = Request(
        prompt=prompt.conditional,
        unconditional=prompt.unconditional,
        grammar=grammar,
        text=ask.text.apply(numbers.text),
        visual=ask.visual.apply(numbers.image),
        guidance=guidance,
        seed=ask.seed,
        max_new_tokens=_budget(ask, grammar=grammar, room=max_positions - used),
        max_images=_max_images(ask),
        stop=ask.stop,
        top_logprobs=ask.top_logprobs,
        denoise=ask.denoise,
    )
    if problems := request.problems():
        raise ConfigError(problems)
    return request


def _wrong_codes(ask: Ask, *, tokenizer: TextTokenizer) -> Iterator[str]:
    """What is wrong with the codes and ids that came from outside. Too many images are refused
    unread, or a flood of them would cost its sender less than us."""
    if ask.references > MAX_REFERENCES:
        return
    turns = [(f"turn {at}, reference image", turn.images) for at, turn in enumerate(ask.earlier)]
    for where, images in (*turns, ("reference image", ask.images)):
        for at, codes_HW in enumerate(images):
            try:
                image_tokens(codes_HW, tokenizer)
            except Emu35Error as error:
                yield f"{where} {at}: {error}"
    for at, turn in enumerate(ask.earlier):
        try:
            answer_ids(turn.answer, vocabulary=tokenizer.vocabulary)
        except Emu35Error as error:
            yield f"turn {at}, answer: {error}"


def _max_images(ask: Ask) -> int:
    if ask.numbers.one_image:
        return 1
    return ask.steps or 0


def _grammar(ask: Ask, *, template: PromptTemplate, tokenizer: TextTokenizer) -> GrammarOptions:
    # A plain prompt is the beginning of a pretraining document, in which nothing asks for an
    # image; and models trained like that are small ones, of small pictures, as often as not.
    plain = template is PromptTemplate.plain
    return GrammarOptions(
        size=_size(ask, tokenizer=tokenizer) if ask.draws else None,
        open_image=plain and ask.numbers.one_image,
        min_digits=1 if plain else 2,
        images=ask.draws,
    )


def _size(ask: Ask, *, tokenizer: TextTokenizer) -> GridSize | None:
    """The grid that every image of the answer gets; None: the model chooses."""
    if ask.size is not None:
        return ask.size
    if ask.ratio is not None:
        shape = ASPECT_RATIOS[ask.ratio]
        return GridSize(height=shape[0], width=shape[1]) if shape else None
    if ask.images:
        return _size_of(ask.images[-1])
    for turn in reversed(ask.earlier):
        answer = answer_ids(turn.answer, vocabulary=tokenizer.vocabulary)
        drawn = split_parts(image_ids(answer, vocabulary=tokenizer.vocabulary), tokenizer)
        shown = [*turn.images, *(part.codes_HW for part in drawn if isinstance(part, Image))]
        if shown:
            return _size_of(shown[-1])
    return None


def _size_of(codes_HW: NDArray[np.integer]) -> GridSize:
    height, width = codes_HW.shape
    return GridSize(height=height, width=width)


def _budget(ask: Ask, *, grammar: GrammarOptions, room: int) -> int:
    """Tokens that an answer may have, ``room`` being what the model's positions leave.

    Raises:
        ConfigError: the prompt, or the images that were asked for, are too long.
    """
    image = grammar.size.image_tokens if grammar.size else 0
    images = max(_max_images(ask), 1)
    if ask.max_new_tokens is not None:
        budget, source = ask.max_new_tokens, "max_new_tokens"
    elif grammar.open_image and image:
        budget, source = image, "the size"
    else:
        budget, source = min(ask.numbers.max_new_tokens, max(room, 1)), "an answer"
    problems: list[str] = []
    if budget > room:
        problems.append(
            f"the prompt leaves {max(room, 0)} of the model's positions, but {source} needs "
            f"{budget}; ask for less (size, max_new_tokens), or shorten the prompt (fewer turns, "
            "fewer or smaller references: image_area)"
        )
    if images * image > budget:
        what = (
            f"{images} images of {grammar.size} codes have"
            if images > 1
            else (f"an image of {grammar.size} codes has")
        )
        fewer = "fewer steps, " if images > 1 else ""
        problems.append(
            f"{what} {images * image} tokens, but only {budget} may be generated; "
            f"use {fewer}a smaller size or a larger max_new_tokens"
        )
    if problems:
        raise ConfigError(problems)
    return budget


def parse_size(text: str) -> GridSize:
    """A grid such as ``64*48`` or ``64x48``, height first, in codes.

    Raises:
        ConfigError: if it is none.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,3})[*x]([1-9][0-9]{0,3})", text.strip())
    if match is None:
        raise ConfigError(f"size {text!r} is no grid; write HEIGHTxWIDTH in codes, such as 64x48")
    return GridSize(height=int(match[1]), width=int(match[2]))


def prompt_seed(seed: int, *, index: int) -> int:
    """The seed of prompt ``index``: mixed, so that neighbouring seeds share no noise."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)
