"""Requests as servers are asked for them, and answers as they are believed.

What is asked is a completion in vLLM's dialect of OpenAI's interface: the prompt as token ids,
``logprobs`` for the log-probability of every token as it was drawn, ``return_token_ids``, and all
that OpenAI has no word for in ``vllm_xargs``. ``emu35 serve`` speaks it too.

What comes back is walked through the grammar token by token, as the engine itself would have: ids
that are legal, a sequence that ends where it has to, log-probabilities that are some. Anything else
is no answer (:class:`BadAnswer`); nothing is repaired or filled in.
"""

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu35.inference.grammar import Grammar, Next, NextKind, SizeIds
from emu35.inference.request import Finish, Generated, Request, Token
from emu35.inference.scheduler import Sequence as Walk
from emu35.inference.scheduler import Stream
from emu35.tokens.serialize import deserialize
from emu35.tokens.template import Sampling
from emu35.tokens.text import TextTokenizer

_ROUNDING = 1e-3
"""How far above 0 a log-probability may come out."""


class BadAnswer(Exception):
    """What a server sent is not an answer to what it was asked; ``str()`` says why."""


def body_of(request: Request, *, model: str) -> dict[str, Any]:
    """The body of ``POST /v1/completions`` that asks for ``request``. The numbers of sampling that
    vLLM itself applies are neutral: those of text and of codes differ, and stand in
    ``vllm_xargs``."""
    grammar, text, visual = request.grammar, request.text, request.visual
    return {
        "model": model,
        "prompt": list(request.prompt),
        "max_tokens": request.max_new_tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "n": 1,
        "seed": request.seed,
        "stop": list(request.stop),
        "logprobs": request.top_logprobs,
        "return_token_ids": True,
        "vllm_xargs": {
            "unconditional_prompt": list(request.unconditional) if request.guided else [],
            "guidance": request.guidance,
            "size": str(grammar.size or ""),
            "same_size": int(grammar.same_size),
            "open_image": int(grammar.open_image),
            "min_digits": grammar.min_digits,
            "images": int(grammar.images),
            "stray_layout": int(grammar.stray_layout),
            "max_images": request.max_images,
            "text_temperature": text.temperature,
            "text_top_k": text.top_k,
            "text_top_p": text.top_p,
            "image_temperature": visual.temperature,
            "image_top_k": visual.top_k,
            "image_top_p": visual.top_p,
            "keep_candidates": int(request.keep_candidates),
        },
    }


def restricted(sampling: Sampling) -> bool:
    """Whether top-k or top-p can leave something out."""
    return sampling.top_k > 0 or sampling.top_p < 1


class Reader:
    """Reads answers; ``tokenizer`` is the model's."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._size_ids = SizeIds.of(tokenizer)

    def answer(self, body: Any, *, request: Request, index: int) -> Generated:
        """The answer to ``request`` that ``body`` holds, under number ``index``.

        Raises:
            BadAnswer: it holds none.
        """
        choice = _choice(body, request=request)
        drawn = _Drawn(choice, request=request)
        walk = self._walk(request)
        for place, id in enumerate(drawn.ids):
            if walk.finish is not None:
                if walk.finish is Finish.images and drawn.ids[place:] == [
                    self._tokenizer.vocabulary.eos
                ]:
                    break  # vLLM knows no other way to end behind a picture
                raise BadAnswer(
                    f"it goes on for {len(drawn.ids) - place} tokens behind its end ({walk.finish})"
                )
            step = walk.next()
            if id not in step:
                raise BadAnswer(f"token {place} is {id}, which is not legal there ({step.kind})")
            walk.append(drawn.token(place, step=step))
        if walk.finish is None:
            raise BadAnswer(
                f"it breaks off behind {len(drawn.ids)} tokens (finish_reason="
                f"{choice.get('finish_reason')!r})"
            )
        return Generated(
            index=index,
            tokens=walk.tokens,
            document=deserialize([token.id for token in walk.tokens], self._tokenizer),
            finish=walk.finish,
        )

    def _walk(self, request: Request) -> Walk:
        """The sequence of ``request`` before its first token."""
        return Walk(
            index=0,
            request=request,
            grammar=Grammar(
                vocabulary=self._tokenizer.vocabulary,
                size_ids=self._size_ids,
                options=request.grammar,
            ),
            tokenizer=self._tokenizer,
            conditional=Stream(tokens=[], most=0),
            unconditional=None,
        )


def _choice(body: Any, *, request: Request) -> dict[str, Any]:
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswer("it has no single choice")
    choice: dict[str, Any] = choices[0]
    prompt = choice.get("prompt_token_ids")
    if prompt is not None and prompt != list(request.prompt):
        raise BadAnswer("it answers another prompt (prompt_token_ids)")
    if choice.get("finish_reason") not in ("stop", "length"):
        raise BadAnswer(f"it ended with finish_reason={choice.get('finish_reason')!r}")
    return choice


class _Drawn:
    """The ids of a choice and what is said of each."""

    def __init__(self, choice: dict[str, Any], *, request: Request) -> None:
        said = choice.get("logprobs")
        said = said if isinstance(said, dict) else {}
        self.ids: list[int] = _numbers(choice.get("token_ids"), int, name="token_ids")
        count = len(self.ids)
        self._logprobs = _numbers(said.get("token_logprobs"), float, name="token_logprobs")
        self._support: list[int] | None = None
        if "support" in said:
            self._support = _numbers(said["support"], int, name="support")
        self._candidates = _candidates(choice.get("candidates"), count=count)
        self._request = request
        for name, values in (("token_logprobs", self._logprobs), ("support", self._support)):
            if values is not None and len(values) != count:
                raise BadAnswer(f"{name} has {len(values)} values for {count} tokens")

    def token(self, place: int, *, step: Next) -> Token:
        """Token ``place``, drawn from ``step``."""
        id, logprob = self.ids[place], self._logprobs[place]
        if not math.isfinite(logprob) or logprob > _ROUNDING:
            raise BadAnswer(f"token {place} has log-probability {logprob}")
        if step.kind is NextKind.FORCED:
            if abs(logprob) > _ROUNDING:
                raise BadAnswer(f"token {place} is forced, but has log-probability {logprob}")
            return Token(id=id, kind=step.kind)
        legal = sum(stop - start for start, stop in step.ranges)
        kept = self._candidates[place] if self._candidates is not None else None
        support = self._support[place] if self._support is not None else None
        sampling = self._request.text if step.kind is NextKind.TEXT else self._request.visual
        if support is None and not restricted(sampling):
            support = legal
        if self._request.keep_candidates and kept is None and support != legal:
            missing = "support" if support is None else "candidates"
            raise BadAnswer(f"token {place} does not say what it was drawn from ({missing})")
        if support is None:  # nobody will draw it again
            support = len(kept) if kept is not None else 0
        elif not 1 <= support <= legal or (kept is not None and len(kept) != support):
            raise BadAnswer(f"token {place} was drawn among {support} of {legal} legal ids")
        if kept is not None and (id not in kept or any(np.diff(kept) <= 0)):
            raise BadAnswer(f"token {place} is {id}, which is not among its candidates")
        return Token(id=id, kind=step.kind, logprob=logprob, support=support, candidates=kept)


def _numbers(values: Any, kind: type, *, name: str) -> list[Any]:
    if not isinstance(values, list):
        raise BadAnswer(f"it has no {name}")
    kinds = (int,) if kind is int else (int, float)
    if not all(isinstance(each, kinds) and not isinstance(each, bool) for each in values):
        raise BadAnswer(f"{name} holds something other than numbers")
    return values


def _candidates(said: Any, *, count: int) -> Sequence[NDArray[np.int32] | None] | None:
    if said is None:
        return None
    try:
        counts = _numbers(said["counts"], int, name="candidates")
        ids = np.frombuffer(base64.b64decode(said["ids"], validate=True), dtype="<i4")
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswer(f"its candidates cannot be read: {error}") from error
    if len(counts) != count or sum(max(each, 0) for each in counts) != len(ids):
        raise BadAnswer("its candidates are not those of its tokens")
    found: list[NDArray[np.int32] | None] = []
    start = 0
    for each in counts:
        found.append(None if each < 0 else ids[start : start + each].astype(np.int32))
        start += max(each, 0)
    return found
