"""What goes into the engine and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from emu35.inference.grammar import GrammarOptions
from emu35.inference.sampler import EVERYTHING, sampling_problems
from emu35.tokens.document import Document
from emu35.tokens.template import Sampling


class Finish(StrEnum):
    """Why a sequence ended."""

    eos = "eos"
    image = "image"  # at the end of an image, where the request asked for one
    length = "length"  # max_new_tokens; an image cut short is a Broken part of the document


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to generate.

    ``unconditional`` is the prompt of the second stream and needed only where ``guidance``
    differs from 1. ``visual`` also samples the digits of a free grid size. ``stop_at_image`` ends
    the sequence with the first image. Equal requests with equal seeds give equal tokens.
    """

    prompt: Sequence[int]
    unconditional: Sequence[int] = ()
    grammar: GrammarOptions = field(default_factory=GrammarOptions)
    text: Sampling = EVERYTHING
    visual: Sampling = EVERYTHING
    guidance: float = 1.0
    seed: int = 0
    max_new_tokens: int = 5120
    stop_at_image: bool = False

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional stream at all."""
        return self.guidance != 1.0

    @property
    def slots(self) -> int:
        """Cache slots that the longer stream can fill."""
        return max(len(self.prompt), len(self.unconditional)) + self.max_new_tokens

    def problems(self) -> list[str]:
        """Everything that keeps the request from being run, as sentences."""
        found = [
            *sampling_problems(self.text, name="text"),
            *sampling_problems(self.visual, name="image"),
        ]
        if not self.prompt:
            found.append("the prompt has no tokens; a sequence starts with at least BOS")
        if self.guided and not self.unconditional:
            found.append(
                f"guidance {self.guidance} needs an unconditional prompt; give one, or guidance 1"
            )
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """The answer to request number ``index`` (in order of submission): every generated id, EOS
    included, and the same as text and images. ``document.problems`` names what is no image: one cut
    short by the limit, or the layout tokens that the official decoder, too, permits in text."""

    index: int
    ids: list[int]
    document: Document
    finish: Finish
