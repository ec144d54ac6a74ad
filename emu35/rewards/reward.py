"""What a reward is, and what is asked of its numbers."""

import math
import numbers
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from emu35.errors import DataError

Record: TypeAlias = Mapping[str, Any]
"""A prompt as it stands in the file of prompts, with keys that only its reward knows."""

Pictures: TypeAlias = Sequence[NDArray[np.uint8]]
"""An answer's pictures in order, each RGB [H, W, 3]."""


class Reward(Protocol):
    """A function of a record and an answer's pictures; larger is better."""

    def __call__(self, record: Record, pictures: Pictures, /) -> float: ...


@runtime_checkable
class Checking(Protocol):
    """A reward that can tell whether a record has what it needs."""

    def problems(self, record: Record) -> list[str]:
        """What the record lacks, as sentences."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedReward:
    """A reward under the name that a user called it by."""

    name: str
    function: Reward

    def problems(self, record: Record) -> list[str]:
        """What keeps ``record`` from being scored, as far as the reward can tell beforehand."""
        return self.function.problems(record) if isinstance(self.function, Checking) else []

    def score(self, record: Record, *, pictures: Pictures, where: str) -> float:
        """The reward of an answer; ``where`` is how messages name it.

        Raises:
            DataError: the reward failed, or what it gave is no finite number.
        """
        try:
            value = self.function(record, pictures)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise DataError(
                f"reward {self.name} failed on {where}: {type(error).__name__}: {error} "
                f"({last.filename}, line {last.lineno}); mend it and run the same command again"
            ) from error
        # The user's function may return anything.
        found: object = value
        if not isinstance(found, numbers.Real) or not math.isfinite(found):
            raise DataError(
                f"reward {self.name} gave {found!r} for {where}; it must be a finite number, and "
                "larger is better"
            )
        return float(found)
