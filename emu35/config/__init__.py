"""Every configuration dataclass, one file a section, and nothing heavier than the standard library.

The design keeps these in a single ``config.py``; they are a package instead so that each section
stays readable by itself, while ``show``, ``plan`` and ``--help`` can still import all of them
without torch. A section owns its fields and the rules between its own fields (``problems()``);
rules that span sections live in :mod:`emu35.config.rules`.

Hydra and OmegaConf impose three habits. ``slots=True`` is what turns an unknown key into an error.
Enums are ``StrEnum`` whose member name equals the value, because OmegaConf looks members up by
name. A section with several kinds is typed by its base class and each kind is a subclass, found
through the tables in :mod:`emu35.config.root`.
"""

from emu35.config.checkpoint import CheckpointConfig
from emu35.config.data import (
    DataConfig,
    FilterConfig,
    Interpolation,
    Overlong,
    Packing,
    SourceConfig,
    TokenDataConfig,
    ValidationConfig,
)
from emu35.config.dida import DiDAConfig, PathConfig, PathKind, Sampler
from emu35.config.dida_eval import DiDAEvalConfig, Features
from emu35.config.engine import (
    FP8,
    EngineConfig,
    FP8Recipe,
    LayerSpec,
    Recompute,
    RecomputeModule,
)
from emu35.config.grpo import GRPOConfig
from emu35.config.guard import GuardConfig
from emu35.config.images import (
    Buckets,
    ImageDataConfig,
    PictureFilterConfig,
    ScorerConfig,
)
from emu35.config.launch import LaunchConfig, LaunchKind
from emu35.config.log import LogConfig, WandbMode
from emu35.config.model import AttentionBackend, IBQConfig, LMConfig, ModelConfig
from emu35.config.optim import OptimConfig, Schedule
from emu35.config.parallel import ParallelConfig
from emu35.config.prompts import PromptDataConfig, PromptTaskConfig
from emu35.config.reward import RewardConfig
from emu35.config.root import KINDS, RunConfig
from emu35.config.stage import (
    Adapter,
    IBQStageConfig,
    LMStageConfig,
    LoRAConfig,
    LoRATarget,
    LossWeights,
    NewRows,
    NewRowsConfig,
    Precision,
    PretrainConfig,
    SFTConfig,
    StageConfig,
)
from emu35.config.tokenizer import TokenizerConfig, TokenizerKind
from emu35.config.tokenizer_eval import (
    FaceEvalConfig,
    Fid,
    LpipsBackbone,
    LpipsConfig,
    TextEvalConfig,
    TokenizerEvalConfig,
)
from emu35.config.tokenizer_objective import (
    AdversarialConfig,
    DistillationConfig,
    EntropyConfig,
    PerceptualConfig,
    PerceptualKind,
    TeacherKind,
)

__all__ = [
    "FP8",
    "KINDS",
    "Adapter",
    "AdversarialConfig",
    "AttentionBackend",
    "Buckets",
    "CheckpointConfig",
    "DataConfig",
    "DiDAConfig",
    "DiDAEvalConfig",
    "DistillationConfig",
    "EngineConfig",
    "EntropyConfig",
    "FP8Recipe",
    "FaceEvalConfig",
    "Features",
    "Fid",
    "FilterConfig",
    "GRPOConfig",
    "GuardConfig",
    "IBQConfig",
    "IBQStageConfig",
    "ImageDataConfig",
    "Interpolation",
    "LMConfig",
    "LMStageConfig",
    "LaunchConfig",
    "LaunchKind",
    "LayerSpec",
    "LoRAConfig",
    "LoRATarget",
    "LogConfig",
    "LossWeights",
    "LpipsBackbone",
    "LpipsConfig",
    "ModelConfig",
    "NewRows",
    "NewRowsConfig",
    "OptimConfig",
    "Overlong",
    "Packing",
    "ParallelConfig",
    "PathConfig",
    "PathKind",
    "PerceptualConfig",
    "PerceptualKind",
    "PictureFilterConfig",
    "Precision",
    "PretrainConfig",
    "PromptDataConfig",
    "PromptTaskConfig",
    "Recompute",
    "RecomputeModule",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "Sampler",
    "Schedule",
    "ScorerConfig",
    "SourceConfig",
    "StageConfig",
    "TeacherKind",
    "TextEvalConfig",
    "TokenDataConfig",
    "TokenizerConfig",
    "TokenizerEvalConfig",
    "TokenizerKind",
    "ValidationConfig",
    "WandbMode",
]
