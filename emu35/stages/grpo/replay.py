"""What every token of a rollout was chosen from, by walking the grammar once more.

The legal set of a token depends on the tokens before it and on how many more may come, so it need
not travel with the rollout: the grammar gives it again, and shows on the way that the rollout is
one (a forced token is the only legal one, a sampled one is legal, kinds agree).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emu35.errors import DataError
from emu35.inference.grammar import Grammar, NextKind, SizeIds
from emu35.model.policy import LegalSet
from emu35.stages.grpo.types import Rollout, TokenKind
from emu35.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Legal:
    """Of T tokens: ``sets``, what each was chosen from, and ``both_T`` (bool), whether the
    unconditional stream is fed it too."""

    sets: Sequence[LegalSet]
    both_T: NDArray[np.bool_]


def legal_sets(rollout: Rollout, *, vocabulary: Vocabulary, size_ids: SizeIds) -> Legal:
    """Walk the grammar over ``rollout``.

    Raises:
        DataError: it is not what its behaviour policy could have drawn; the token is named.
    """
    behaviour = rollout.behaviour
    grammar = Grammar(vocabulary=vocabulary, size_ids=size_ids, options=behaviour.grammar)
    sets: list[LegalSet] = []
    both: list[bool] = []
    tokens = zip(rollout.ids.tolist(), rollout.kinds.tolist(), strict=True)
    for place, (token, kind) in enumerate(tokens):
        step = grammar.next(room=behaviour.max_new_tokens - place)
        if token not in step or TokenKind.of(step.kind) != kind:
            expected = "the only legal one" if step.kind is NextKind.FORCED else "legal"
            raise DataError(
                f"token {place} of a rollout is {token} ({TokenKind(kind).name}), which is not "
                f"{expected} there ({step.kind.value}: {_shown(step.ranges)}); the rollout is "
                "damaged, or its engine followed another grammar"
            )
        sets.append(step.ranges)
        both.append(grammar.accept(token))
    return Legal(sets=sets, both_T=np.array(both, dtype=bool))


def _shown(ranges: LegalSet) -> str:
    parts = [str(start) if end == start + 1 else f"{start}..{end - 1}" for start, end in ranges]
    return ", ".join(parts[:4]) + (" ..." if len(parts) > 4 else "")
