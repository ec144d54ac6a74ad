"""What a reward is shown, and what it may answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Record: TypeAlias = Mapping[str, Any]
"""A prompt as it stands in the file of prompts, with keys that only its rewards know."""

Picture: TypeAlias = NDArray[np.uint8]
"""RGB [H, W, 3]."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One answer as rewards see it.

    Attributes:
        record: the prompt's record.
        task: name of its task template (``t2i``, ``x2i``, ``story`` ...).
        prompt: what was asked, in words.
        texts: the text before each picture, and the one behind the last: one more than pictures.
        pictures: the answer's pictures in order.
        references: the pictures that the question shows, in order, as the model saw them.
        where: how messages name the answer.
    """

    record: Record
    task: str
    prompt: str
    texts: Sequence[str]
    pictures: Sequence[Picture]
    references: Sequence[Picture] = ()
    where: str = "a sample"


@dataclass(frozen=True, slots=True)
class Unscored:
    """No score, and why: never a number in its place."""

    reason: str


Score: TypeAlias = float | Unscored


class Cost(StrEnum):
    """What a reward spends: CPU time, GPU time, or somebody else's time behind a network."""

    cpu = "cpu"
    gpu = "gpu"
    network = "network"


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The scores of a reward lie between ``low``, the worst, and ``high``, the best. ``low`` may be
    the larger number."""

    low: float
    high: float


class Reward(Protocol):
    """Judges answers. Called from several threads at once.

    Attributes:
        range: of its scores.
        cost: what a call spends.
    """

    range: Range
    cost: Cost

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """One score a sample, in order. :class:`Unscored` where this sample cannot be judged (no
        picture where one is needed, say); an exception where the call failed and may be repeated.
        """
        ...

    def problems(self, record: Record) -> list[str]:
        """What keeps answers to ``record`` from being scored, as sentences, as far as it can be
        told beforehand."""
        ...
