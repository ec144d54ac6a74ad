"""A request of the engine said in full, as trainers do: ``vllm_xargs`` of a completion.

The field and the kinds of its values (numbers, strings, lists of numbers) are vLLM's, whose servers
hand it to their plugins, so that one body can be sent to either. Nothing in it is filled in from a
task, and the seed of the body is the request's own: the same as the engine draws from when it is
asked in the trainer's process.
"""

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from emu35.inference.ask import parse_size
from emu35.inference.grammar import GrammarOptions
from emu35.inference.request import Request
from emu35.tokens.template import Sampling

Flag: TypeAlias = Annotated[int, Field(ge=0, le=1)]


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise ValueError("must be a list of token ids")
    return value


class ExactArguments(BaseModel):
    """What a request has beside prompt, seed, ``max_tokens`` and ``stop``. ``size`` is empty for a
    free one; flags are 0 or 1; ``keep_candidates`` asks for the ids that top-k and top-p left."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    unconditional_prompt: Annotated[
        list[int], PlainValidator(_ids, json_schema_input_type=list[int])
    ] = Field(default_factory=list)
    guidance: float = 1.0
    size: str = ""
    same_size: Flag = 1
    open_image: Flag = 0
    min_digits: int = 2
    images: Flag = 1
    stray_layout: Flag = 0
    max_images: int = Field(default=0, ge=0)
    text_temperature: float = 1.0
    text_top_k: int = 0
    text_top_p: float = 1.0
    image_temperature: float = 1.0
    image_top_k: int = 0
    image_top_p: float = 1.0
    keep_candidates: Flag = 0

    @property
    def grammar(self) -> GrammarOptions:
        """The grammar that they name.

        Raises:
            ConfigError: the size is none.
        """
        return GrammarOptions(
            size=parse_size(self.size) if self.size else None,
            same_size=bool(self.same_size),
            open_image=bool(self.open_image),
            min_digits=self.min_digits,
            images=bool(self.images),
            stray_layout=bool(self.stray_layout),
        )

    @property
    def text(self) -> Sampling:
        """How text is drawn."""
        return Sampling(
            temperature=self.text_temperature, top_k=self.text_top_k, top_p=self.text_top_p
        )

    @property
    def visual(self) -> Sampling:
        """How codes are drawn."""
        return Sampling(
            temperature=self.image_temperature, top_k=self.image_top_k, top_p=self.image_top_p
        )

    def request(
        self, prompt: list[int], *, seed: int, max_tokens: int, stop: tuple[str, ...], top: int
    ) -> Request:
        """The request as a whole; ``top`` rivals of each token are reported.

        Raises:
            ConfigError: the size is none.
        """
        return Request(
            prompt=prompt,
            unconditional=self.unconditional_prompt,
            grammar=self.grammar,
            text=self.text,
            visual=self.visual,
            guidance=self.guidance,
            seed=seed,
            max_new_tokens=max_tokens,
            max_images=self.max_images,
            stop=stop,
            top_logprobs=top,
            keep_candidates=bool(self.keep_candidates),
        )
