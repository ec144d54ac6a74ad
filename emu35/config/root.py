"""The whole configuration of a run, and the table that maps a kind to its class."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from emu35.config.checkpoint import CheckpointConfig
from emu35.config.data import DataConfig, TokenDataConfig
from emu35.config.dida import DiDAConfig
from emu35.config.dida_eval import DiDAEvalConfig
from emu35.config.engine import EngineConfig
from emu35.config.grpo import GRPOConfig
from emu35.config.guard import GuardConfig
from emu35.config.images import SCORER_KINDS, ImageDataConfig, ScorerConfig
from emu35.config.launch import LaunchConfig
from emu35.config.log import LogConfig
from emu35.config.model import IBQConfig, LMConfig, ModelConfig
from emu35.config.optim import OptimConfig
from emu35.config.parallel import ParallelConfig
from emu35.config.prompts import PromptDataConfig
from emu35.config.reward import RewardConfig
from emu35.config.reward_kinds import REWARD_KINDS
from emu35.config.stage import IBQStageConfig, PretrainConfig, SFTConfig, StageConfig
from emu35.config.tokenizer import TokenizerConfig
from emu35.config.tokenizer_eval import TokenizerEvalConfig

KINDS: Mapping[str, Mapping[str, type]] = MappingProxyType(
    {
        "model": MappingProxyType({"lm": LMConfig, "ibq": IBQConfig}),
        "data": MappingProxyType(
            {"tokens": TokenDataConfig, "images": ImageDataConfig, "prompts": PromptDataConfig}
        ),
        "stage": MappingProxyType(
            {
                "pretrain": PretrainConfig,
                "sft": SFTConfig,
                "dida": DiDAConfig,
                "dida_eval": DiDAEvalConfig,
                "grpo": GRPOConfig,
                "ibq": IBQStageConfig,
                "tokenizer_eval": TokenizerEvalConfig,
            }
        ),
    }
)
"""Sections with several kinds: section name -> kind -> class."""

ENTRY_KINDS: Mapping[type, Mapping[str, type]] = MappingProxyType(
    {RewardConfig: REWARD_KINDS, ScorerConfig: SCORER_KINDS}
)
"""The same for entries of named sections (``stage.rewards.NAME``, ``data.scorers.NAME``), by their
base class."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run. ``run_dir`` is where it happens and is not part of the
    identity that a resumed run is compared with. ``deterministic`` makes two runs in one layout
    equal bit by bit on GPUs too, at some cost in speed; on a CPU they are anyway."""

    name: str = "run"
    run_dir: str = "runs/${name}"
    seed: int = 1234
    deterministic: bool = False
    model: ModelConfig = field(default_factory=LMConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=TokenDataConfig)
    stage: StageConfig = field(default_factory=PretrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
