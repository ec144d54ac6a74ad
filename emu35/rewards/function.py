"""``function``: anybody's own."""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Protocol, cast, runtime_checkable

from emu35.config.reward import FunctionRewardConfig
from emu35.errors import ConfigError
from emu35.rewards.call import checked
from emu35.rewards.sample import Cost, Picture, Range, Record, Sample, Score
from emu35.rewards.scale import configured_range

Function = Callable[[Record, Sequence[Picture]], float]
"""A record and an answer's pictures, RGB [H, W, 3], to a number."""

ANYWHERE = Range(low=-math.inf, high=math.inf)
"""The range of a function of which none was told: good enough to compare answers, but not to map
them to a scale."""


@runtime_checkable
class Checking(Protocol):
    """A function that can tell whether a record has what it needs."""

    def problems(self, record: Record) -> list[str]:
        """What the record lacks, as sentences."""
        ...


class FunctionReward:
    """``config.function``, called for one sample after the other; :class:`Unscored` is an answer
    of its own. It is called from several threads where ``concurrency`` says so.

    Raises:
        ConfigError: there is no such module or function, or it cannot be called.
    """

    def __init__(self, config: FunctionRewardConfig) -> None:
        self._function = find_function(config.function)
        self.range = configured_range(config) or ANYWHERE
        self.cost = Cost.cpu

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """What the function gives for each.

        Raises:
            RewardFailed: what it gave is no finite number.
        """
        found = [self._function(sample.record, sample.pictures) for sample in samples]
        return checked(found, of=len(samples))

    def problems(self, record: Record) -> list[str]:
        """What the function says of the record, if it can."""
        return self._function.problems(record) if isinstance(self._function, Checking) else []


def find_function(name: str) -> Function:
    """The function ``package.module:function``.

    Raises:
        ConfigError: there is no such module or function; or it cannot be called.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"reward {name!r} names no function; write package.module:function")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"reward {name!r}: module {module_name} cannot be imported ({error}); is it installed, "
            "or on PYTHONPATH?"
        ) from error
    found: object = getattr(module, attribute, None)
    if not callable(found):
        where = getattr(module, "__file__", None) or module_name
        what = "is no function" if hasattr(module, attribute) else "does not exist"
        raise ConfigError(
            f"reward {name!r}: {attribute} {what} in {where}; name a function of "
            "(record, pictures) that gives a number"
        )
    # What it takes and gives shows when it is called.
    return cast(Function, found)
