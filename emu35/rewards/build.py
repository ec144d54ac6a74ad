"""Rewards from their configuration: the only place that knows every kind."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from emu35.config.reward import FunctionRewardConfig, RewardConfig
from emu35.config.reward_kinds import REWARD_KINDS
from emu35.config.schema import did_you_mean
from emu35.errors import ConfigError
from emu35.rewards.aesthetics import AestheticsReward
from emu35.rewards.aesthetics_model import AestheticsModelReward
from emu35.rewards.faces import FacesReward
from emu35.rewards.function import FunctionReward
from emu35.rewards.identity import IdentityReward
from emu35.rewards.judge import ConsistencyReward, JudgeReward
from emu35.rewards.named import NamedReward
from emu35.rewards.ocr import OcrReward
from emu35.rewards.ocr_layout import OcrLayoutReward
from emu35.rewards.preservation import PreservationReward
from emu35.rewards.sample import Reward
from emu35.rewards.scene import SceneReward
from emu35.rewards.similarity import SimilarityReward
from emu35.rewards.similarity_endpoint import SimilarityEndpointReward

# A kind's maker takes the class that REWARD_KINDS has for it.
MAKERS: Mapping[str, Callable[[Any], Reward]] = MappingProxyType(
    {
        "scene": SceneReward,
        "function": FunctionReward,
        "judge": JudgeReward,
        "consistency": ConsistencyReward,
        "similarity_endpoint": SimilarityEndpointReward,
        "ocr": OcrReward,
        "ocr_layout": OcrLayoutReward,
        "faces": FacesReward,
        "identity": IdentityReward,
        "aesthetics": AestheticsReward,
        "aesthetics_model": AestheticsModelReward,
        "similarity": SimilarityReward,
        "preservation": PreservationReward,
    }
)
"""``kind`` -> what makes the reward from its configuration. Packages of extras are imported for it
when the reward is made, not before."""


def build_rewards(configs: Mapping[str, RewardConfig]) -> dict[str, Reward]:
    """The rewards of ``stage.rewards``, by name.

    Raises:
        ConfigError: naming every one that cannot be made, and why.
    """
    rewards: dict[str, Reward] = {}
    problems: list[str] = []
    for name, config in configs.items():
        try:
            rewards[name] = MAKERS[config.kind](config)
        except ConfigError as error:
            problems += [f"stage.rewards.{name}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return rewards


def find_reward(name: str) -> NamedReward:
    """The reward that a command line calls ``name``: a kind that needs nothing configured, or
    ``package.module:function``.

    Raises:
        ConfigError: there is no such kind, module or function, or the kind needs configuration.
    """
    if ":" in name:
        return NamedReward(name=name, reward=FunctionReward(FunctionRewardConfig(function=name)))
    bare = {kind: cls() for kind, cls in REWARD_KINDS.items()}
    ready = [kind for kind, config in bare.items() if not list(config.problems(kind))]
    if name in ready:
        return NamedReward(name=name, reward=MAKERS[name](bare[name]))
    known = ", ".join(ready)
    if name in bare:
        raise ConfigError(
            f"reward {name!r} has to be configured, which only a run's stage.rewards can do; use "
            f"one of {known}, or package.module:function"
        )
    raise ConfigError(
        f"reward {name!r} is unknown; use one of {known}, or package.module:function."
        + did_you_mean(name, ready)
    )
