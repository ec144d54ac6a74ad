"""Every kind of reward, and the class of its configuration."""

from collections.abc import Mapping
from types import MappingProxyType

from emu35.config.reward import FunctionRewardConfig, RewardConfig, SceneRewardConfig
from emu35.config.reward_local import (
    AestheticsModelRewardConfig,
    AestheticsRewardConfig,
    FacesRewardConfig,
    IdentityRewardConfig,
    OcrLayoutRewardConfig,
    OcrRewardConfig,
    PreservationRewardConfig,
    SimilarityRewardConfig,
)
from emu35.config.reward_remote import (
    ConsistencyRewardConfig,
    JudgeRewardConfig,
    SimilarityEndpointRewardConfig,
)

REWARD_KINDS: Mapping[str, type[RewardConfig]] = MappingProxyType(
    {
        "scene": SceneRewardConfig,
        "function": FunctionRewardConfig,
        "ocr": OcrRewardConfig,
        "ocr_layout": OcrLayoutRewardConfig,
        "faces": FacesRewardConfig,
        "identity": IdentityRewardConfig,
        "aesthetics": AestheticsRewardConfig,
        "aesthetics_model": AestheticsModelRewardConfig,
        "similarity": SimilarityRewardConfig,
        "preservation": PreservationRewardConfig,
        "judge": JudgeRewardConfig,
        "consistency": ConsistencyRewardConfig,
        "similarity_endpoint": SimilarityEndpointRewardConfig,
    }
)
"""``kind`` of an entry of ``stage.rewards`` -> its class."""
