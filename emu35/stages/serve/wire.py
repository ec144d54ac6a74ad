"""Answers in OpenAI's JSON, whole and in chunks. What is ours is an extra field beside theirs.

Everything a client needs to learn from an answer comes along where it asked: the ids, the
log-probability of each under the policy that chose it, and whether the grammar forced it.
"""

import base64
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np

from emu35.inference.grammar import NextKind
from emu35.inference.request import Finish, Generated, Request, Token
from emu35.stages.serve.protocol import Look
from emu35.tokens.text import TextTokenizer

Json: TypeAlias = dict[str, Any]

_REASONS = {
    Finish.eos: "stop",
    Finish.images: "stop",
    Finish.stop: "stop",
    Finish.length: "length",
    Finish.abort: "abort",
}


@dataclass(kw_only=True, slots=True)
class Piece:
    """Something of an answer that can be sent: exactly one field is set."""

    text: str = ""
    thought: str = ""
    part: Json | None = None


@dataclass(kw_only=True, slots=True)
class Answer:
    """One choice, whole. ``parts`` are texts and images in order."""

    request: Request
    generated: Generated
    parts: list[Json] = field(default_factory=list[Json])
    thought: str = ""

    @property
    def text(self) -> str:
        """The text of all parts."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def has_images(self) -> bool:
        """Whether a part is an image."""
        return any(part["type"] == "image_url" for part in self.parts)


class Wire(Protocol):
    """How one kind of call is answered. ``weights`` says by which weights, once it runs."""

    weights: str

    def whole(self, answers: Sequence[Answer]) -> Json:
        """The body of an answer that is not streamed."""
        ...

    def chunk(
        self, place: int, piece: Piece | None, tokens: Sequence[Token], *, first: bool = False
    ) -> Json:
        """A chunk of a stream: a piece, and the tokens that have come with it."""
        ...

    def last(self, place: int, generated: Generated) -> Json:
        """The chunk that says why a choice has ended."""
        ...

    def usage(self, asked: Sequence[Request], answers: Sequence[Generated]) -> Json:
        """The chunk of the counts."""
        ...


class _Envelope:
    """What all bodies of one answer share."""

    def __init__(
        self, look: Look, *, kind: str, chunk: str, prefix: str, model: str, seed: int
    ) -> None:
        self._look, self._kind, self._chunk_kind = look, kind, chunk
        self.weights = ""
        self._shared: Json = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "seed": seed,
        }

    def _body(self, choices: list[Json], *, chunk: bool) -> Json:
        kind = self._chunk_kind if chunk else self._kind
        body: Json = {**self._shared, "weights": self.weights, "object": kind, "choices": choices}
        if chunk and self._look.include_usage:
            body["usage"] = None  # the counts come with the last chunk
        return body

    def usage(self, asked: Sequence[Request], answers: Sequence[Generated]) -> Json:
        """The chunk of the counts, which has no choices."""
        return {**self._body([], chunk=True), "usage": usage(asked, answers)}


class CompletionWire(_Envelope):
    """``POST /v1/completions``."""

    def __init__(self, look: Look, *, tokenizer: TextTokenizer, model: str, seed: int) -> None:
        kind = "text_completion"
        super().__init__(look, kind=kind, chunk=kind, prefix="cmpl", model=model, seed=seed)
        self._tokenizer = tokenizer
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[Answer]) -> Json:
        """A ``text_completion``; ``parts`` where there are images."""
        choices: list[Json] = []
        for place, answer in enumerate(answers):
            tokens = answer.generated.tokens
            choice: Json = {
                "index": place,
                "text": answer.text,
                "logprobs": self._logprobs(place, tokens),
                **_candidates(answer),
                "finish_reason": _REASONS[answer.generated.finish],
                **_extras(answer, ids=self._look.return_token_ids),
            }
            if answer.has_images:
                choice["parts"] = answer.parts
            if answer.thought:
                choice["reasoning_content"] = answer.thought
            choices.append(choice)
        asked = [answer.request for answer in answers]
        counts = usage(asked, [answer.generated for answer in answers])
        return {**self._body(choices, chunk=False), "usage": counts}

    def chunk(
        self, place: int, piece: Piece | None, tokens: Sequence[Token], *, first: bool = False
    ) -> Json:
        """More text, a thought (``reasoning_content``) or a part."""
        choice: Json = {"index": place, "text": piece.text if piece else "", "finish_reason": None}
        if piece and piece.thought:
            choice["reasoning_content"] = piece.thought
        if piece and piece.part:
            choice["parts"] = [piece.part]
        choice["logprobs"] = self._logprobs(place, tokens) if tokens else None
        if self._look.return_token_ids:
            choice["token_ids"] = [token.id for token in tokens]
        return self._body([choice], chunk=True)

    def last(self, place: int, generated: Generated) -> Json:
        """Why a choice has ended."""
        reason = _REASONS[generated.finish]
        choice: Json = {"index": place, "text": "", "logprobs": None, "finish_reason": reason}
        if generated.document.problems:
            choice["problems"] = generated.document.problems
        return self._body([choice], chunk=True)

    def _logprobs(self, place: int, tokens: Sequence[Token]) -> Json | None:
        if self._look.logprobs is None:
            return None
        words = [self._tokenizer.decode((token.id,)) for token in tokens]
        offset, offsets = self._offsets.get(place, 0), list[int]()
        for word in words:
            offsets.append(offset)
            offset += len(word)
        self._offsets[place] = offset
        top = [{self._tokenizer.decode((id,)): value for id, value in t.top} for t in tokens]
        return {
            "tokens": words,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top if self._look.logprobs else None,
            "text_offset": offsets,
            "token_ids": [token.id for token in tokens],
            "forced": [token.forced for token in tokens],
            "support": [token.support for token in tokens],
        }


class ChatWire(_Envelope):
    """``POST /v1/chat/completions``."""

    def __init__(self, look: Look, *, tokenizer: TextTokenizer, model: str, seed: int) -> None:
        super().__init__(
            look,
            kind="chat.completion",
            chunk="chat.completion.chunk",
            prefix="chatcmpl",
            model=model,
            seed=seed,
        )
        self._tokenizer = tokenizer

    def whole(self, answers: Sequence[Answer]) -> Json:
        """A ``chat.completion``; the content is a list of parts where there are images."""
        choices: list[Json] = []
        for place, answer in enumerate(answers):
            content = answer.parts if answer.has_images else answer.text
            message: Json = {"role": "assistant", "content": content}
            if answer.thought:
                message["reasoning_content"] = answer.thought
            choices.append(
                {
                    "index": place,
                    "message": message,
                    "logprobs": self._logprobs(answer.generated.tokens),
                    "finish_reason": _REASONS[answer.generated.finish],
                    **_extras(answer, ids=self._look.return_token_ids),
                }
            )
        asked = [answer.request for answer in answers]
        counts = usage(asked, [answer.generated for answer in answers])
        return {**self._body(choices, chunk=False), "usage": counts}

    def chunk(
        self, place: int, piece: Piece | None, tokens: Sequence[Token], *, first: bool = False
    ) -> Json:
        """More text, a thought (``reasoning_content``), or an image or its progress (``parts``)."""
        delta: Json = {"role": "assistant"} if first else {}
        if piece and piece.text:
            delta["content"] = piece.text
        if piece and piece.thought:
            delta["reasoning_content"] = piece.thought
        if piece and piece.part:
            delta["parts"] = [piece.part]
        choice: Json = {"index": place, "delta": delta, "finish_reason": None}
        choice["logprobs"] = self._logprobs(tokens) if tokens else None
        if self._look.return_token_ids:
            choice["token_ids"] = [token.id for token in tokens]
        return self._body([choice], chunk=True)

    def last(self, place: int, generated: Generated) -> Json:
        """Why a choice has ended."""
        choice: Json = {"index": place, "delta": {}, "logprobs": None}
        choice["finish_reason"] = _REASONS[generated.finish]
        if generated.document.problems:
            choice["problems"] = generated.document.problems
        return self._body([choice], chunk=True)

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if self._look.logprobs is None:
            return None
        return {
            "content": [
                {
                    **self._entry(token.id, token.logprob),
                    "id": token.id,
                    "forced": token.forced,
                    "support": token.support,
                    "top_logprobs": [
                        {**self._entry(id, value), "id": id} for id, value in token.top
                    ],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _entry(self, id: int, logprob: float) -> Json:
        content = self._tokenizer.decode_bytes((id,))
        return {
            "token": content.decode("utf-8", errors="replace"),
            "bytes": list(content),
            "logprob": logprob,
        }


def _candidates(answer: Answer) -> Json:
    """What top-k and top-p left of the legal ids at every token, where it is asked for: how many
    (-1: all), and the ids of all tokens one after the other, little-endian int32 in base64."""
    if not answer.request.keep_candidates:
        return {}
    kept = [token.candidates for token in answer.generated.tokens]
    ids = [each for each in kept if each is not None]
    content = np.concatenate(ids).astype("<i4").tobytes() if ids else b""
    return {
        "candidates": {
            "counts": [-1 if each is None else len(each) for each in kept],
            "ids": base64.b64encode(content).decode(),
        }
    }


def _extras(answer: Answer, *, ids: bool) -> Json:
    extras: Json = {}
    if ids:
        extras["token_ids"] = answer.generated.ids
        extras["prompt_token_ids"] = list(answer.request.prompt)
    if answer.generated.document.problems:
        extras["problems"] = answer.generated.document.problems
    return extras


def usage(asked: Sequence[Request], answers: Sequence[Generated]) -> Json:
    """Counts of tokens; equal prompts of one call (``n`` choices) count once, as at OpenAI's."""
    prompts = {id(request.prompt): len(request.prompt) for request in asked}
    prompt = sum(prompts.values())
    tokens = [token for answer in answers for token in answer.tokens]
    visual = sum(token.kind is NextKind.VISUAL for token in tokens)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": len(tokens),
        "total_tokens": prompt + len(tokens),
        "completion_tokens_details": {
            "visual_tokens": visual,
            "forced_tokens": sum(token.forced for token in tokens),
        },
    }
