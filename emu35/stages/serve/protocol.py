"""The bodies of requests: OpenAI's fields, and ours beside them.

Strict: a wrong type, a number that is none, or an unknown field is an error rather than a guess. Of
OpenAI's fields those we cannot honour are taken with the value that changes nothing, because
clients send them by themselves, and refused with any other.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    field_validator,
    model_validator,
)

from emu35.dida.samplers import Sampler
from emu35.inference.request import (
    MOST_SHIFT,
    MOST_STEPS,
    MOST_TOP_LOGPROBS,
    Decoder,
    stray_numbers,
)
from emu35.stages.serve.exact import ExactArguments
from emu35.stages.serve.neutral import IGNORED, MESSAGE_NEUTRAL, NEUTRAL
from emu35.stages.serve.refusal import shown
from emu35.tokens.template import Task

MOST_CHOICES = 128
"""Answers that one call may ask for."""

MOST_STOPS = 16
"""Stop strings of one call."""

MOST_FIELDS = 100
"""Keys of one JSON object, wrong ones included."""

MOST_PARTS = 2**14
"""Messages of one call and the parts of their contents, together."""

LARGEST = 1000.0
"""Temperature and guidance at most. Nobody wants more, and far beyond it single precision ends: the
step would fail, and with it whatever else was in it."""

EVERY_EIGHTH = -1
"""``stream_previews=true``: a preview every eighth of a picture."""


class Body(BaseModel):
    """Any JSON object of ours. ``neutral`` and ``ignored`` are OpenAI's fields that it may carry;
    null is as good as leaving a field out that may be left out."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _meaningful(cls, values: Any) -> Any:
        """Drop fields that ask for nothing; refuse those that ask for what we do not do."""
        if not isinstance(values, dict):
            return values  # which the form itself refuses
        if len(values) > MOST_FIELDS:
            raise ValueError(f"{len(values)} fields in one object; give at most {MOST_FIELDS}")
        kept: dict[str, Any] = {}
        for name, value in values.items():
            if name in cls.model_fields:
                if value is not None or cls.model_fields[name].is_required():
                    kept[name] = value
            elif name in cls.neutral:
                if value not in cls.neutral[name]:
                    raise ValueError(f"{name}={shown(value)} is not supported; leave {name} out")
            elif name not in cls.ignored:
                kept[name] = value
        return kept


TopK: TypeAlias = Annotated[int, AfterValidator(lambda k: 0 if k == -1 else k)]
"""How many candidates are kept; 0, and vLLM's -1, keep all."""


class ImageSampling(Body):
    """How visual tokens are drawn; None keeps what the task recommends."""

    temperature: float | None = Field(default=None, le=LARGEST)
    top_p: float | None = None
    top_k: TopK | None = None


class StreamOptions(Body):
    """``include_usage`` sends a last chunk with the counts."""

    include_usage: bool = False
    include_obfuscation: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """How an answer is to look: all that is kept of a body while it is answered, as pictures and
    prompts are large and a call may be long. ``logprobs`` are rivals of each token, None for no
    log-probabilities at all; the rest as in :class:`GenerationBody`."""

    stream: bool
    include_usage: bool
    stream_previews: int
    return_images: bool
    return_token_ids: bool
    logprobs: int | None


class GenerationBody(Body):
    """What completions and chat have in common.

    ``temperature``, ``top_p`` and ``top_k`` hold for text, ``image_sampling`` for visual tokens.
    ``size`` is a grid in codes, height first (``64x48``), ``ratio`` a name such as 16:9.
    ``max_images`` ends the answer behind so many images; 0 permits none. ``stream_previews`` sends
    the unfinished picture every so many rows (true: about eight times a picture).
    ``return_images`` false leaves pictures undecoded, for callers that want ids. ``image_area`` is
    the number of pixels that references are resized to. ``decoder`` dida decodes pictures in
    parallel, where the model was adapted to it: by ``sampler`` in ``denoise_steps`` steps, of which
    ``denoise_shift`` above 1 spends more near the noise, guided until the time ``guidance_until``.
    """

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = Field(default=None, le=LARGEST)
    top_p: float | None = None
    top_k: TopK | None = None
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: Any = Field(default=None, validate_default=True)
    stream: bool = False
    stream_options: StreamOptions | None = None
    task: Task | None = None
    guidance: float | None = Field(default=None, ge=-LARGEST, le=LARGEST)
    size: str | None = None
    ratio: str | None = None
    image_sampling: ImageSampling = Field(default_factory=ImageSampling)
    max_images: int | None = Field(default=None, ge=0)
    stream_previews: int = 0
    return_token_ids: bool = False
    return_images: bool = True
    image_area: int | None = None
    decoder: Decoder = Decoder.ar
    denoise_steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    sampler: Sampler | None = None
    denoise_shift: float | None = Field(default=None, gt=0, le=MOST_SHIFT)
    guidance_until: float | None = Field(default=None, ge=0, le=1)

    neutral = NEUTRAL
    ignored = IGNORED

    @model_validator(mode="before")
    @classmethod
    def _object(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError('the body must be a JSON object, such as {"prompt": "..."}')
        return values

    @field_validator("stream_previews", mode="before")
    @classmethod
    def _rows_between(cls, value: Any) -> int:
        if isinstance(value, bool):
            return EVERY_EIGHTH if value else 0
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{shown(value)} must be true, false or a number of rows")
        return value

    @field_validator("stop")
    @classmethod
    def _stop_strings(cls, value: Any) -> tuple[str, ...]:
        stops = () if value is None else (value,) if isinstance(value, str) else value
        if not isinstance(stops, list | tuple) or not all(isinstance(s, str) for s in stops):
            raise ValueError(f"{shown(value)} must be a string or a list of strings")
        if len(stops) > MOST_STOPS or "" in stops:
            raise ValueError(f"{len(stops)} strings; give at most {MOST_STOPS}, and none empty")
        return tuple(stops)

    @model_validator(mode="after")
    def _one_grid(self) -> Self:
        if self.size is not None and self.ratio is not None:
            raise ValueError("size and ratio both fix the grid; give one of them")
        return self

    @model_validator(mode="after")
    def _one_decoder(self) -> Self:
        names = ("denoise_steps", "sampler", "denoise_shift", "guidance_until")
        if found := stray_numbers(self.decoder, {name: getattr(self, name) for name in names}):
            raise ValueError(found[0])
        return self

    def _look(self, *, logprobs: int | None) -> Look:
        return Look(
            stream=self.stream,
            include_usage=self.stream_options is not None and self.stream_options.include_usage,
            stream_previews=self.stream_previews,
            return_images=self.return_images,
            return_token_ids=self.return_token_ids,
            logprobs=logprobs,
        )


def _as_ids(value: Any) -> list[int]:
    """pydantic's own check of a list holds the interpreter's lock until its end; this one does
    not, so that it stays in its thread."""
    if not isinstance(value, list) or not _are_ids(value):
        raise ValueError(f"{shown(value)} must be a list of token ids")
    return value


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


Ids: TypeAlias = Annotated[list[int], PlainValidator(_as_ids, json_schema_input_type=list[int])]


class CompletionBody(GenerationBody):
    """``POST /v1/completions``.

    ``prompt`` is a string, token ids, or a list of either. A string continues as it stands (BOS and
    the text); with ``task`` it is the question in that task's template. ``unconditional_prompt``
    are the ids of the stream that ``guidance`` steers away from. ``logprobs`` asks for the
    log-probability of every token and so many of its best rivals. ``vllm_xargs`` says the request
    of the engine in full (:mod:`.exact`).
    """

    prompt: Any
    logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    echo: bool = False
    unconditional_prompt: Ids | None = None
    vllm_xargs: ExactArguments | None = None

    @field_validator("prompt")
    @classmethod
    def _prompts(cls, value: Any) -> list[str | Ids]:
        prompts = _as_prompts(value)
        if not prompts:
            raise ValueError(
                f"{shown(value)} is no prompt; give a string, a list of strings, token ids, "
                "or a list of lists of token ids, none of them empty"
            )
        return prompts

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.echo:
            raise ValueError(
                "echo=true is not supported, as a prompt may hold images; you have the prompt: "
                "put it before the answer, and leave echo out"
            )
        if len(self.prompt) * self.n > MOST_CHOICES:
            raise ValueError(
                f"{len(self.prompt)} prompts with n={self.n} are {len(self.prompt) * self.n} "
                f"answers; ask for at most {MOST_CHOICES} in one call"
            )
        return self

    @property
    def look(self) -> Look:
        """What answering needs of this body."""
        look = self._look(logprobs=self.logprobs)
        return look if self.vllm_xargs is None else replace(look, return_images=False)


def _as_prompts(value: Any) -> list[str | Ids]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        return []
    if _are_ids(value):
        return [value]
    if all(isinstance(each, str) for each in value):
        return value
    if all(isinstance(each, list) and each and _are_ids(each) for each in value):
        return value
    return []


class TextPart(Body):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """A picture as a ``data:`` URL; ``detail`` is OpenAI's and changes nothing here."""

    url: str
    detail: str | None = None


class ImagePart(Body):
    """A picture of a message; ``number`` and ``size`` are what our own answers carry."""

    type: Literal["image_url"]
    image_url: ImageUrl
    number: int | None = None
    size: str | None = None


Part: TypeAlias = Annotated[TextPart | ImagePart, Discriminator("type")]


class Message(Body):
    """One message of a dialogue. An assistant's may carry the ``token_ids`` it was generated as,
    which then stand for its content: a picture that goes through pixels loses a little."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    token_ids: Ids | None = None

    neutral = MESSAGE_NEUTRAL

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.token_ids is not None and self.role != "assistant":
            raise ValueError(f"token_ids in a message of role {self.role}; only answers have them")
        if self.content is None and self.token_ids is None:
            raise ValueError("the message has no content; give text or a list of parts")
        return self

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content; empty where there are only ids."""
        return self.content or []

    @property
    def text(self) -> str:
        """The text of all parts."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


def _count_parts(messages: list[Any]) -> int:
    contents = (each.get("content") for each in messages if isinstance(each, dict))
    return len(messages) + sum(len(each) for each in contents if isinstance(each, list))


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``.

    ``task`` (default chat: text about text and pictures) chooses the template. A chat answers with
    pictures only where ``size``, ``ratio`` or ``max_images`` asks for them.
    """

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)

    @field_validator("messages", mode="before")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        if isinstance(value, list) and (count := _count_parts(value)) > MOST_PARTS:
            raise ValueError(f"{count} messages and parts; give at most {MOST_PARTS}")
        return value

    @model_validator(mode="after")
    def _dialogue(self) -> Self:
        if self.messages[-1].role != "user":
            raise ValueError(
                f"the last message has role {self.messages[-1].role}; it must be the user's, "
                "which is what gets answered"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true; set it, or leave top_logprobs out")
        if self.max_completion_tokens is not None and self.max_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are one thing; give one of them")
        return self

    @property
    def look(self) -> Look:
        """What answering needs of this body."""
        return self._look(logprobs=(self.top_logprobs or 0) if self.logprobs else None)

    @property
    def token_limit(self) -> int | None:
        """Tokens the answer may have."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
