"""The nouns of reinforcement learning: prompts, rollouts of the behaviour policy, scored groups.

Suffixes: T tokens of one answer, K candidates of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from emu35.inference.grammar import GrammarOptions, NextKind
from emu35.inference.request import Finish
from emu35.rewards.sample import Record
from emu35.rewards.scale import Scores
from emu35.tokens.template import Sampling


class TokenKind(IntEnum):
    """What a token was chosen from (:class:`~emu35.inference.grammar.NextKind`), as a number."""

    forced = 0
    among = 1
    text = 2
    visual = 3

    @classmethod
    def of(cls, kind: NextKind) -> "TokenKind":
        return cls[kind.value]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt of task set ``task``; ``number`` is its line's place in the file (from 0), and
    ``references`` are codes [H, W] of the pictures it shows."""

    task: str
    number: int
    id: str
    record: Record
    references: Sequence[NDArray[np.integer]] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Behaviour:
    """The behaviour policy of a rollout: what its tokens were drawn from. The trainer replays it:
    the grammar with ``max_new_tokens`` gives the legal set of every token, temperature and
    ``guidance`` its distribution."""

    text: Sampling
    visual: Sampling
    guidance: float
    grammar: GrammarOptions
    max_new_tokens: int
    max_images: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rollout:
    """One sampled answer.

    Attributes:
        prompt_ids, unconditional_ids: what its two streams began with; the latter is empty without
            guidance.
        seed: of its draws.
        step: the weights are those before training step ``step``.
        ids: int32 [T], every generated token, EOS included.
        logprobs: fp32 [T], under the behaviour policy; 0 where forced.
        support: int32 [T], candidates that the token was drawn among; 1 where forced.
        kinds: uint8 [T], :class:`TokenKind`.
        candidates: for each token the ids int32 [K], ascending, that top-k and top-p left of the
            legal set; None where they left all.
    """

    prompt_ids: NDArray[np.int32]
    unconditional_ids: NDArray[np.int32]
    behaviour: Behaviour
    seed: int
    step: int
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    support: NDArray[np.int32]
    kinds: NDArray[np.uint8]
    finish: Finish
    candidates: Sequence[NDArray[np.int32] | None] = ()

    @property
    def forced(self) -> NDArray[np.bool_]:
        """bool [T]: the grammar left no choice."""
        return self.kinds == TokenKind.forced

    @property
    def truncated(self) -> bool:
        """Whether the length limit cut its text. Limits end no picture: the grammar opens none that
        does not fit, so an answer whose picture fills its last tokens is whole."""
        return self.finish is Finish.length and self.kinds[-1] != TokenKind.forced


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A prompt, the answers to it, and their scores in the same order; ``serial`` is the number of
    this draw of a prompt among all of the run."""

    serial: int
    prompt: Prompt
    rollouts: Sequence[Rollout]
    scores: Sequence[Scores]
