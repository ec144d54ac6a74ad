"""A reward from its name."""

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import cast

from emu35.config.schema import did_you_mean
from emu35.errors import ConfigError
from emu35.rewards.reward import NamedReward, Reward
from emu35.rewards.scene import SceneReward

REWARDS: Mapping[str, Callable[[], Reward]] = MappingProxyType({"scene": SceneReward})
"""Name -> what makes the reward."""


def find_reward(name: str) -> NamedReward:
    """The reward called ``name``: one of :data:`REWARDS`, or ``package.module:function``.

    Raises:
        ConfigError: there is no such reward, module or function; or it cannot be called.
    """
    if name in REWARDS:
        return NamedReward(name=name, function=REWARDS[name]())
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        known = ", ".join(REWARDS)
        raise ConfigError(
            f"reward {name!r} is unknown; use one of {known}, or package.module:function."
            + did_you_mean(name, list(REWARDS))
        )
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"reward {name!r}: module {module_name} cannot be imported ({error}); is it installed, "
            "or on PYTHONPATH?"
        ) from error
    found: object = getattr(module, attribute, None)
    if not callable(found):
        what = "is no function" if hasattr(module, attribute) else "does not exist"
        raise ConfigError(
            f"reward {name!r}: {attribute} {what} in {module.__file__}; name a function of "
            "(record, pictures) that gives a number"
        )
    # What it takes and gives shows when it is called.
    return NamedReward(name=name, function=cast(Reward, found))
