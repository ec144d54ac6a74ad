"""From bodies to requests of the engine.

The rules of tasks, templates and numbers are those of :mod:`emu35.inference.ask`, which the command
line follows as well; only plain continuations and ids go past it.
"""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from emu35.errors import ConfigError
from emu35.inference.ask import (
    Ask,
    SamplingOverride,
    Turn,
    build_request,
    parse_size,
    prompt_seed,
)
from emu35.inference.grammar import GrammarOptions, GridSize
from emu35.inference.request import DenoiseOptions, Request, denoise_options
from emu35.inference.sampler import EVERYTHING
from emu35.stages.serve.exact import ExactArguments
from emu35.stages.serve.pictures import Codes, Pictures, Sent
from emu35.stages.serve.prompt_ids import check_ids
from emu35.stages.serve.protocol import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    ImagePart,
    Message,
    TextPart,
)
from emu35.stages.serve.refusal import Refusal
from emu35.tokens.serialize import image_tokens
from emu35.tokens.template import ASPECT_RATIOS, TASKS, PromptTemplate, Task
from emu35.tokens.text import TextTokenizer

_LONGEST_TOKEN = 128
"""Bytes of the longest token of the released table: more text than this a position cannot fit."""

COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion that names none and has no task, as in OpenAI's interface."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asker:
    """What bodies are read with. ``max_length`` counts tokens of prompt and answer."""

    tokenizer: TextTokenizer
    template: PromptTemplate
    max_length: int

    def completion(self, body: CompletionBody, *, seed: int) -> list[Request]:
        """The requests of a completion: those of the first prompt, then those of the second.

        Raises:
            Refusal, ConfigError: the body asks for something that cannot be.
        """
        if body.vllm_xargs is not None:
            return [self._exact(body, body.vllm_xargs, seed=seed)]
        if body.unconditional_prompt is not None:
            self._check_ids(body.unconditional_prompt, name="unconditional_prompt")
        requests: list[Request] = []
        for at, prompt in enumerate(body.prompt):
            name = "prompt" if len(body.prompt) == 1 else f"prompt[{at}]"
            first = self._completion(body, prompt, name=name)
            requests += [first] * body.n
        return _seeded(requests, seed=seed)

    def _completion(self, body: CompletionBody, prompt: str | list[int], *, name: str) -> Request:
        if isinstance(prompt, str):
            self._check_length(len(prompt), name=name)
            if body.task is not None:
                request = self._ask(_ask(body, task=body.task, question=prompt), body=body)
                return self._steered(request, body)
            ids = [self.tokenizer.vocabulary.bos, *self.tokenizer.encode(prompt)]
        else:
            self._check_ids(prompt, name=name)
            ids = prompt
        return self._steered(self._continuation(body, ids), body)

    def _exact(self, body: CompletionBody, exact: ExactArguments, *, seed: int) -> Request:
        """The request that ``exact`` says in full; whatever else the body asks for would change
        it."""
        prompt = body.prompt[0]
        allowed = {"model", "prompt", "max_tokens", "seed", "stop", "logprobs", "vllm_xargs"}
        neutral = {"n": 1, "temperature": 1, "top_p": 1, "top_k": 0, "return_token_ids": True}
        neutral |= {"return_images": False}
        for name in body.model_fields_set - allowed:
            if name not in neutral or getattr(body, name) != neutral[name]:
                raise Refusal(
                    f"{name} beside vllm_xargs, which say a request in full; leave it out",
                    param=name,
                )
        if isinstance(prompt, str) or len(body.prompt) > 1 or body.max_tokens is None:
            raise Refusal(
                "vllm_xargs need one prompt, of token ids, and max_tokens", param="vllm_xargs"
            )
        self._check_ids(prompt, name="prompt")
        self._check_ids(exact.unconditional_prompt or prompt, name="unconditional_prompt")
        return exact.request(
            prompt,
            seed=seed,
            max_tokens=body.max_tokens,
            stop=body.stop,
            top=body.logprobs or 0,
        )

    def _continuation(self, body: CompletionBody, ids: list[int]) -> Request:
        """Go on behind ``ids``. A task gives its numbers; its template is only for questions."""
        numbers = TASKS[body.task] if body.task else None
        most = body.max_tokens
        if most is None:
            room = max(self.max_length - len(ids), 1)
            most = min(numbers.max_new_tokens, room) if numbers else COMPLETION_TOKENS
        size = _grid(body)
        draws = body.max_images != 0
        return Request(
            prompt=ids,
            grammar=GrammarOptions(size=size if draws else None, min_digits=1, images=draws),
            text=_text_sampling(body).apply(numbers.text if numbers else EVERYTHING),
            visual=_image_sampling(body).apply(numbers.image if numbers else EVERYTHING),
            guidance=1.0 if body.guidance is None else body.guidance,
            # A stream of nothing but BOS is what plain text is steered away from.
            unconditional=[self.tokenizer.vocabulary.bos],
            max_new_tokens=most,
            max_images=body.max_images or int(numbers is not None and numbers.one_image),
            stop=body.stop,
            top_logprobs=body.logprobs or 0,
            denoise=_denoise(body),
        )

    def _steered(self, request: Request, body: CompletionBody) -> Request:
        if body.unconditional_prompt is not None:
            return replace(request, unconditional=body.unconditional_prompt)
        given_ids = not isinstance(body.prompt[0], str)
        if given_ids and request.guided:
            raise Refusal(
                f"guidance={body.guidance} with a prompt of ids needs unconditional_prompt, the "
                "ids that it steers away from; give it, or guidance 1",
                param="unconditional_prompt",
                code="missing_unconditional_prompt",
            )
        return request

    async def chat(self, body: ChatBody, *, pictures: Pictures, seed: int) -> list[Request]:
        """The requests of a chat, one a choice.

        Raises:
            Refusal, ConfigError: the body asks for something that cannot be.
        """
        task = body.task or Task.chat
        pictures.check(_sent(body.messages))
        await asyncio.to_thread(self._check_messages, body.messages)
        area = self._area(body, task=task, factor=pictures.factor)
        turns = await self._turns(body.messages, pictures=pictures, area=area)
        ask = replace(
            _ask(body, task=task, question=turns[-1].question),
            images=turns[-1].images,
            earlier=tuple(turns[:-1]),
            max_new_tokens=body.token_limit,
            top_logprobs=body.top_logprobs or 0,
        )
        # Long texts take a while to tokenize.
        request = await asyncio.to_thread(self._ask, ask, body=body)
        return _seeded([request] * body.n, seed=seed)

    def _ask(self, ask: Ask, *, body: GenerationBody) -> Request:
        if ask.numbers.one_image and body.max_images not in (None, 1):
            raise Refusal(
                f"max_images={body.max_images}, but task {ask.task.value} is one image; leave "
                "max_images out, or choose another task",
                param="max_images",
            )
        request = build_request(
            ask,
            tokenizer=self.tokenizer,
            template=self.template,
            max_positions=self.max_length,
        )
        if body.max_images == 0:
            grammar = replace(request.grammar, size=None, open_image=False, images=False)
            return replace(request, grammar=grammar, max_images=0)
        return request

    def _area(self, body: ChatBody, *, task: Task, factor: int) -> int:
        """Pixels that references are resized to: what the body says, else what the task recommends
        as far as all of them together take a third of the positions: the answer's image is often
        as large as the last of them.

        Raises:
            Refusal: an area that no prompt of this server can hold.
        """
        most = self.max_length * factor**2
        if body.image_area is None:
            count = len(_sent(body.messages))
            return max(factor**2, min(TASKS[task].image_area, most // (3 * max(count, 1))))
        if not 0 < body.image_area <= most:
            raise Refusal(
                f"image_area={body.image_area} must lie in 1..{most} pixels, which is what the "
                f"{self.max_length} tokens of this server hold; ask for less",
                param="image_area",
            )
        return body.image_area

    def _check_messages(self, messages: Sequence[Message]) -> None:
        self._check_length(sum(len(message.text) for message in messages), name="messages")
        for at, message in enumerate(messages):
            if message.token_ids is not None:
                self._check_ids(message.token_ids, name=f"messages[{at}].token_ids")

    def _check_ids(self, ids: Sequence[int], *, name: str) -> None:
        check_ids(ids, tokenizer=self.tokenizer, name=name, max_length=self.max_length)

    def _check_length(self, characters: int, *, name: str) -> None:
        """Refuse at once what would only be found too long after it was tokenized."""
        most = _LONGEST_TOKEN * self.max_length
        if characters > most:
            raise Refusal(
                f"{name}: a text of {characters} characters; {most} are more than fit the "
                f"{self.max_length} tokens of this server: shorten it",
                param=name,
                code="context_length_exceeded",
            )

    async def _turns(
        self, messages: Sequence[Message], *, pictures: Pictures, area: int
    ) -> list[Turn]:
        """Questions with their answers; the last one has none. System messages go before the
        question that follows them, as the template has no other place."""
        turns: list[Turn] = []
        words: list[str] = []
        images: list[Codes] = []
        asked = False
        for at, message in enumerate(messages):
            sent = _sent([message], first=at)
            if message.role == "assistant":
                if not asked:
                    raise Refusal(
                        f"messages[{at}] is an answer without a question; put a user's message "
                        "before it, and merge answers that follow each other",
                        param=f"messages[{at}]",
                    )
                answer = await self._answer(message, at=at, pictures=pictures)
                turns.append(
                    Turn(question="\n".join(words), images=tuple(images), answer=tuple(answer))
                )
                words, images, asked = [], [], False
                continue
            words += [message.text] if message.text else []
            images += await pictures.encode(sent, area=area)
            asked = asked or message.role == "user"
        return [*turns, Turn(question="\n".join(words), images=tuple(images), answer=())]

    async def _answer(self, message: Message, *, at: int, pictures: Pictures) -> list[int]:
        if message.token_ids is not None:
            return message.token_ids
        grids = await pictures.encode(_sent([message], first=at), area=None)
        return await asyncio.to_thread(self._answer_ids, message, grids)

    def _answer_ids(self, message: Message, images: Sequence[Codes]) -> list[int]:
        grids, ids = iter(images), list[int]()
        for part in message.parts:
            if isinstance(part, TextPart):
                ids += self.tokenizer.encode(part.text)
            else:
                ids += image_tokens(next(grids), self.tokenizer)
        return ids


def _ask(body: GenerationBody, *, task: Task, question: str) -> Ask:
    """The wish of a body, its pictures and earlier turns left out."""
    return Ask(
        task=task,
        question=question,
        size=_size(body.size),
        ratio=body.ratio,
        guidance=body.guidance,
        text=_text_sampling(body),
        visual=_image_sampling(body),
        max_new_tokens=body.max_tokens,
        steps=body.max_images or None,
        stop=body.stop,
        top_logprobs=body.logprobs or 0 if isinstance(body, CompletionBody) else 0,
        denoise=_denoise(body),
    )


def _denoise(body: GenerationBody) -> DenoiseOptions | None:
    return denoise_options(
        body.decoder,
        steps=body.denoise_steps,
        sampler=body.sampler,
        shift=body.denoise_shift,
        guidance_until=body.guidance_until,
    )


def _text_sampling(body: GenerationBody) -> SamplingOverride:
    return SamplingOverride(temperature=body.temperature, top_k=body.top_k, top_p=body.top_p)


def _image_sampling(body: GenerationBody) -> SamplingOverride:
    given = body.image_sampling
    return SamplingOverride(temperature=given.temperature, top_k=given.top_k, top_p=given.top_p)


def _size(text: str | None) -> GridSize | None:
    return None if text is None else parse_size(text)


def _grid(body: GenerationBody) -> GridSize | None:
    """The grid that size or ratio fix."""
    if body.ratio is None:
        return _size(body.size)
    if body.ratio not in ASPECT_RATIOS:
        raise ConfigError(
            f"ratio {body.ratio!r} is unknown; use one of {', '.join(ASPECT_RATIOS)}, or give a "
            "size"
        )
    shape = ASPECT_RATIOS[body.ratio]
    return GridSize(height=shape[0], width=shape[1]) if shape else None


def _sent(messages: Sequence[Message], *, first: int = 0) -> list[Sent]:
    """The pictures of ``messages``, the first of which is number ``first`` of the body."""
    return [
        Sent(url=part.image_url.url, place=f"messages[{first + at}].content[{place}]")
        for at, message in enumerate(messages)
        for place, part in enumerate(message.parts)
        if isinstance(part, ImagePart)
    ]


def new_seed() -> int:
    """A seed for a call that names none."""
    return secrets.randbits(32)


def _seeded(requests: Sequence[Request], *, seed: int) -> list[Request]:
    """``requests`` with seeds that share no noise, even where calls have neighbouring seeds; the
    same as the command line gives to its prompts."""
    return [replace(each, seed=prompt_seed(seed, index=at)) for at, each in enumerate(requests)]
