"""A call of a reward: how it may fail, and what is asked of what it gives."""

import math
import numbers
import traceback
from collections.abc import Sequence

from emu35.errors import DataError
from emu35.rewards.sample import Score, Unscored


class RewardFailed(DataError):
    """A call that gave no scores.

    Any exception of a reward counts as a failed call that may be repeated; this one says more.

    Args:
        message: what went wrong.
        repeat: whether another call could do better; without it the samples are unscored at once.
        after: seconds for which the other side asked to be left alone; None where it did not.
        timed_out: the call took longer than it may.
    """

    def __init__(
        self,
        message: str,
        *,
        repeat: bool = True,
        after: float | None = None,
        timed_out: bool = False,
    ) -> None:
        super().__init__(message)
        self.repeat = repeat
        self.after = after
        self.timed_out = timed_out


def checked(scores: object, *, of: int) -> list[Score]:
    """``scores`` as a reward gave them for ``of`` samples, if they are what they should be.

    Raises:
        RewardFailed: too few, too many, or something that is neither a finite number nor
            :class:`~emu35.rewards.sample.Unscored`.
    """
    if isinstance(scores, str) or not isinstance(scores, Sequence):
        raise RewardFailed(f"gave {_shown(scores)}; it must give one score a sample, in order")
    if len(scores) != of:
        raise RewardFailed(f"gave {len(scores)} scores for {of} samples; it must give one for each")
    return [_checked(score) for score in scores]


def _checked(score: object) -> Score:
    if isinstance(score, Unscored):
        return score
    number = None if isinstance(score, bool) else score
    if not isinstance(number, numbers.Real) or not math.isfinite(number):
        raise RewardFailed(f"gave {_shown(score)}; a score must be a finite number")
    return float(number)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def told(error: BaseException) -> str:
    """Why a call failed, in one line: what raised, and for errors that are not ours, where."""
    if isinstance(error, DataError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
