"""Prompts to requests under the behaviour policy."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from emu35.config.grpo import PolicyConfig
from emu35.errors import ConfigError
from emu35.inference.ask import Ask, SamplingOverride, build_request
from emu35.inference.request import Request
from emu35.stages.grpo.prompts import TaskPrompt
from emu35.tokens.template import PromptTemplate
from emu35.tokens.text import TextTokenizer


def answer_seed(seed: int, *, task: str, number: int, serial: int, sample: int) -> int:
    """The seed of answer ``sample`` to prompt ``number`` of ``task``, drawn as prompt ``serial`` of
    the run: independent of the layout, and another one whenever the prompt comes again."""
    name = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "little")
    mixed = np.random.SeedSequence([seed, name, number, serial, sample])
    return int(mixed.generate_state(1, np.uint64)[0] >> 1)


def request_of(
    prompt: TaskPrompt,
    *,
    policy: PolicyConfig,
    references: Sequence[NDArray[np.integer]],
    tokenizer: TextTokenizer,
    template: PromptTemplate,
    max_positions: int,
    row_length: int | None,
    seed: int,
) -> Request:
    """What the engine is asked of ``prompt``, whose references are codes [H, W]: its grammar, the
    policy's numbers, and as many tokens as the prompt, its task or ``row_length`` allow. None: the
    answer is only judged; it stands in no row, and nothing that a replay needs is kept of it.

    Raises:
        ConfigError: it does not fit the model or a row, and why.
    """
    ask = replace(
        prompt.wish.ask(images=references, seed=seed),
        guidance=policy.guidance,
        visual=SamplingOverride(
            temperature=policy.temperature, top_k=policy.top_k, top_p=policy.top_p
        ),
        text=SamplingOverride(
            temperature=policy.text_temperature, top_k=policy.text_top_k, top_p=policy.text_top_p
        ),
    )

    def build(ask: Ask) -> Request:
        request = build_request(
            ask, tokenizer=tokenizer, template=template, max_positions=max_positions
        )
        # The trainer replays what top-k and top-p left.
        return replace(request, keep_candidates=row_length is not None)

    request = build(ask)
    if row_length is None or row_tokens(request) <= row_length:
        return request
    streams = len(request.prompts)
    room = (row_length - sum(map(len, request.prompts))) // streams + 1
    said = f"data.sequence_length={row_length} leaves {max(room, 0)} tokens to an answer"
    if streams > 1:
        said += ", which with guidance stands in its row twice"
    if ask.max_new_tokens is not None or room < 1:
        needs = f", but it may have {request.max_new_tokens}" if room > 0 else ""
        raise ConfigError(f"{said}{needs}; make rows longer, or the answer or its prompt shorter")
    try:
        return build(replace(ask, max_new_tokens=room))
    except ConfigError as error:
        raise ConfigError([f"{said}: {problem}" for problem in error.problems]) from error


def row_tokens(request: Request) -> int:
    """What its longest answer takes of a row of the trainer: every stream, less the last token,
    from which nothing is predicted."""
    return sum(len(prompt) + request.max_new_tokens - 1 for prompt in request.prompts)
