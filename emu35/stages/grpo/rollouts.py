"""Requests to rollouts: what the engine answered, as the trainer will replay it."""

import numpy as np

from emu35.inference.request import Generated, Request
from emu35.stages.grpo.types import Behaviour, Rollout, TokenKind


def behaviour_of(request: Request) -> Behaviour:
    """The policy that answers to ``request`` are drawn from."""
    return Behaviour(
        text=request.text,
        visual=request.visual,
        guidance=request.guidance if request.guided else 1.0,
        grammar=request.grammar,
        max_new_tokens=request.max_new_tokens,
        max_images=request.max_images,
    )


def rollout_of(answer: Generated, *, request: Request, step: int) -> Rollout:
    """``answer`` to ``request`` by the weights before training step ``step``."""
    tokens = answer.tokens
    return Rollout(
        prompt_ids=np.array(request.prompt, dtype=np.int32),
        unconditional_ids=np.array(request.unconditional if request.guided else (), dtype=np.int32),
        behaviour=behaviour_of(request),
        seed=request.seed,
        step=step,
        ids=np.array([token.id for token in tokens], dtype=np.int32),
        logprobs=np.array([token.logprob for token in tokens], dtype=np.float32),
        support=np.array([token.support for token in tokens], dtype=np.int32),
        kinds=np.array([TokenKind.of(token.kind) for token in tokens], dtype=np.uint8),
        finish=answer.finish,
        candidates=(tuple(token.candidates for token in tokens) if request.keep_candidates else ()),
    )
