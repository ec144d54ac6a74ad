"""Group relative policy optimization: sampling, scoring, the loss and what guards it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from emu35.config.check import at_least
from emu35.config.reward import RewardConfig
from emu35.config.stage import Adapter, LMStageConfig, LossWeights, StageConfig


class Aggregation(StrEnum):
    """How losses of tokens become one number over the global batch.

    ``token_mean``: every sampled token counts alike (DAPO, arXiv 2503.14476).
    ``sequence_mean``: every answer counts alike, its tokens by their mean (GRPO, arXiv 2402.03300).
    ``sequence_sum``: sums of answers by a constant, ``norm_tokens`` (Dr.GRPO, arXiv 2503.20783).
    """

    token_mean = "token_mean"
    sequence_mean = "sequence_mean"
    sequence_sum = "sequence_sum"


class ZeroVariance(StrEnum):
    """What becomes of a group whose rewards are all equal: it stays (and teaches nothing but the
    KL), it is dropped from every mean, or other prompts are sampled in its place (DAPO's dynamic
    sampling)."""

    keep = "keep"
    drop = "drop"
    resample = "resample"


class Reference(StrEnum):
    """What KL is measured to: nothing, a frozen copy of the initial weights, or the model without
    its adapters."""

    none = "none"
    copy = "copy"
    adapter_off = "adapter_off"


class Unscored(StrEnum):
    """What becomes of an answer that a reward could not judge: it is left out, or the run stops."""

    drop = "drop"
    stop = "stop"


class Importance(StrEnum):
    """Correction for a rollout engine that is not quite the trainer: none, or weights
    pi_trainer / pi_rollout of tokens or of whole answers, truncated at ``cap``."""

    none = "none"
    token = "token"
    sequence = "sequence"


class Alarm(StrEnum):
    """What a drift above its threshold does: it is said, or the step changes nothing."""

    warn = "warn"
    skip = "skip"


class EngineKind(StrEnum):
    """Where answers are sampled: ``embedded``, by the trainer's own ranks and weights; ``remote``,
    by servers that speak the protocol of ``emu35 serve`` (vLLM)."""

    embedded = "embedded"
    remote = "remote"


class Mode(StrEnum):
    """``full``: sample, score, train. ``rollouts_only``: sample, score, save (whatever
    ``rollout.save`` says). ``train_only``: train on what was saved."""

    full = "full"
    rollouts_only = "rollouts_only"
    train_only = "train_only"


@dataclass(kw_only=True, slots=True)
class PolicyConfig:
    """The behaviour policy: what answers are drawn from, and what the trainer replays.

    Temperatures scale the logits of text and of pictures; ``top_k`` 0 and ``top_p`` 1 keep all
    that is legal. With ``guidance`` other than 1 the training forward is guided too, at twice the
    cost.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    text_temperature: float = 1.0
    text_top_k: int = 0
    text_top_p: float = 1.0

    def problems(self, where: str) -> Iterator[str]:
        """What is wrong with the policy that the configuration calls ``where``."""
        for name, value in (
            ("temperature", self.temperature),
            ("text_temperature", self.text_temperature),
        ):
            if not value > 0:
                yield f"{where}.{name}={value} must be positive: a greedy policy explores nothing"
        for name, value in (("top_p", self.top_p), ("text_top_p", self.text_top_p)):
            if not 0 < value <= 1:
                yield f"{where}.{name}={value} must lie in (0, 1]"
        yield from at_least(where, 0, top_k=self.top_k, text_top_k=self.text_top_k)


@dataclass(kw_only=True, slots=True)
class RolloutConfig(PolicyConfig):
    """How answers are sampled.

    ``batch_size`` is how many are in flight at once in each tensor-parallel group of ranks,
    ``cache_tokens`` the slots of its cache (None: enough for all of them, as far as memory goes).
    ``save`` writes every step's answers and scores to ``rollouts/`` of the run folder, as ``mode:
    rollouts_only`` always does; ``replay`` names such a folder for ``mode: train_only``.
    ``servers`` are the addresses of remote engines, ``bucket_bytes`` the size of the pieces in
    which weights travel to an engine that does not share the trainer's memory. ``timeout`` are the
    seconds that one answer may take, a server's waiting line included; ``api_key_env`` names the
    environment variable that holds the servers' key.
    """

    engine: EngineKind = EngineKind.embedded
    batch_size: int = 64
    cache_tokens: int | None = None
    servers: list[str] = field(default_factory=list[str])
    timeout: float = 600.0
    api_key_env: str | None = None
    bucket_bytes: int = 512 * 2**20
    save: bool = False
    replay: str | None = None

    def problems(self, where: str) -> Iterator[str]:
        # Zero-argument super() fails in slotted dataclasses (the class is rebuilt).
        yield from PolicyConfig.problems(self, where)
        yield from at_least(where, 1, batch_size=self.batch_size)
        if self.cache_tokens is not None:
            yield from at_least(where, 1, cache_tokens=self.cache_tokens)


@dataclass(kw_only=True, slots=True)
class PolicyLossConfig:
    """The clipped surrogate and what is added to it.

    The ratio is clipped to [1 - ``clip_low``, 1 + ``clip_high``] (equal: PPO; a larger upper one:
    DAPO's clip-higher), and for negative advantages at ``dual_clip`` from above (0: never; arXiv
    1912.09729). ``kl_weight`` times k3 = e^d - d - 1 is added for every sampled token, with d =
    log pi_ref - log pi clamped to +-``kl_clamp``. ``norm_tokens`` divides sums of answers
    (``sequence_sum``; 0: the row length).
    """

    aggregation: Aggregation = Aggregation.sequence_mean
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    kl_weight: float = 1e-3
    kl_clamp: float = 10.0
    entropy_weight: float = 0.0
    norm_tokens: int = 0

    def problems(self) -> Iterator[str]:
        yield from at_least(
            "stage.loss",
            0,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            kl_weight=self.kl_weight,
            norm_tokens=self.norm_tokens,
        )
        if not self.clip_low < 1:
            yield f"stage.loss.clip_low={self.clip_low} must lie below 1: ratios are positive"
        if self.dual_clip != 0 and not self.dual_clip > 1 + self.clip_high:
            yield (
                f"stage.loss.dual_clip={self.dual_clip} must lie above "
                f"1 + clip_high={1 + self.clip_high:g}, or be 0 for none"
            )
        if not self.kl_clamp > 0:
            yield f"stage.loss.kl_clamp={self.kl_clamp} must be positive"


@dataclass(kw_only=True, slots=True)
class AdvantageConfig:
    """A = (r - mean) / (std + ``epsilon``) within a group, std unbiased; without ``divide_by_std``
    A = r - mean (Dr.GRPO). ``resample_rounds`` bounds how often groups without variance are
    replaced in one step."""

    divide_by_std: bool = True
    epsilon: float = 1e-6
    zero_variance: ZeroVariance = ZeroVariance.keep
    resample_rounds: int = 3

    def problems(self) -> Iterator[str]:
        yield from at_least("stage.advantage", 1, resample_rounds=self.resample_rounds)
        if not self.epsilon > 0:
            yield f"stage.advantage.epsilon={self.epsilon} must be positive"


@dataclass(kw_only=True, slots=True)
class DriftConfig:
    """|log pi_trainer - log pi_rollout| of sampled tokens before the first update of a step: an
    ``alarm`` where its mean exceeds ``mean`` or its maximum ``largest``."""

    mean: float = 0.02
    largest: float = 2.0
    alarm: Alarm = Alarm.warn
    importance: Importance = Importance.none
    cap: float = 2.0

    def problems(self) -> Iterator[str]:
        for name, value in (("mean", self.mean), ("largest", self.largest), ("cap", self.cap)):
            if not value > 0:
                yield f"stage.drift.{name}={value} must be positive"


@dataclass(kw_only=True, slots=True)
class EvaluationConfig(PolicyConfig):
    """How answers to validation prompts are drawn: ``samples`` of each, of the first
    ``max_prompts`` of every set. ``patience`` validations without a better mean reward than
    ``min_gain`` above the best one end the run (0: never); ``watch`` names the set and reward,
    ``SET`` (its trained rewards together) or ``SET/REWARD`` (held out ones too), None the mean over
    the sets that have trained rewards."""

    samples: int = 1
    max_prompts: int = 256
    patience: int = 0
    min_gain: float = 0.0
    watch: str | None = None

    def problems(self, where: str) -> Iterator[str]:
        # Zero-argument super() fails in slotted dataclasses (the class is rebuilt).
        yield from PolicyConfig.problems(self, where)
        yield from at_least(where, 1, samples=self.samples, max_prompts=self.max_prompts)
        yield from at_least(where, 0, patience=self.patience, min_gain=self.min_gain)


@dataclass(kw_only=True, slots=True)
class GRPOConfig(LMStageConfig):
    """Reinforcement learning over text and image tokens (paper section 4.2; GRPO, arXiv
    2402.03300).

    A step samples ``rollouts_per_prompt`` answers to each of ``prompts_per_step`` prompts, scores
    them, and passes over them ``epochs`` times in ``minibatches`` parts, with an update after each.
    ``micro_batch_size`` counts packed rows. ``rewards`` are all that tasks may name. An answer that
    a trained reward could not judge is treated as ``unscored`` says, and more than a share of
    ``max_unscored`` of all answers of a step, resampled ones among them, stops the run; of a
    validation's it is only said, unless ``unscored`` is ``stop``. Every ``pages_every`` steps a
    page of ``pages_groups`` groups is written (0: never).
    """

    kind: str = "grpo"
    prompts_per_step: int = 80
    rollouts_per_prompt: int = 8
    epochs: int = 1
    minibatches: int = 1
    mode: Mode = Mode.full
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    reference: Reference = Reference.copy
    unscored: Unscored = Unscored.drop
    max_unscored: float = 0.5
    rewards: dict[str, RewardConfig] = field(default_factory=dict[str, RewardConfig])
    pages_every: int = 10
    pages_groups: int = 8

    @property
    def saves_rollouts(self) -> bool:
        """Whether answers and scores are written to the run folder; where nothing is trained, all
        work would be lost otherwise."""
        return self.rollout.save or self.mode is Mode.rollouts_only

    @property
    def keeps_reference(self) -> bool:
        """Whether a copy of the initial weights is kept beside the trained ones."""
        return self.reference is Reference.copy and self.loss.kl_weight > 0

    def problems(self) -> Iterator[str]:
        # Zero-argument super() fails in slotted dataclasses (the class is rebuilt).
        yield from LMStageConfig.problems(self)
        yield from self._meaningless()
        yield from at_least(
            "stage",
            1,
            prompts_per_step=self.prompts_per_step,
            epochs=self.epochs,
            minibatches=self.minibatches,
        )
        yield from at_least("stage", 2, rollouts_per_prompt=self.rollouts_per_prompt)
        yield from at_least(
            "stage", 0, pages_every=self.pages_every, pages_groups=self.pages_groups
        )
        yield from self.rollout.problems("stage.rollout")
        yield from self.evaluation.problems("stage.evaluation")
        yield from self.advantage.problems()
        yield from self.loss.problems()
        yield from self.drift.problems()
        for name, reward in self.rewards.items():
            yield from reward.problems(name)
        if self.minibatches > self.prompts_per_step:
            yield (
                f"stage.minibatches={self.minibatches} exceeds "
                f"stage.prompts_per_step={self.prompts_per_step}; a part has at least one group"
            )
        if not self.evaluation.guidance >= self.rollout.guidance:
            yield (
                f"stage.evaluation.guidance={self.evaluation.guidance} lies below "
                f"stage.rollout.guidance={self.rollout.guidance}; what is trained with guidance "
                "is used with at least as much"
            )
        if self.loss.kl_weight > 0 and self.reference is Reference.none:
            yield (
                f"stage.loss.kl_weight={self.loss.kl_weight} measures to a reference, but "
                "stage.reference=none; use copy or adapter_off, or kl_weight=0"
            )
        if self.adapter is not Adapter.none and self.keeps_reference:
            yield (
                "stage.reference=copy would keep the frozen weights of stage.adapter twice; use "
                "stage.reference=adapter_off"
            )
        if not 0 <= self.max_unscored < math.inf or self.max_unscored > 1:
            yield f"stage.max_unscored={self.max_unscored} is a share and must lie in [0, 1]"

    def _meaningless(self) -> Iterator[str]:
        """What other stages have and this one does not use must not look as if it did."""
        if self.global_batch_size != StageConfig().global_batch_size:
            yield (
                f"stage.global_batch_size={self.global_batch_size} means nothing here; a step has "
                "stage.prompts_per_step x stage.rollouts_per_prompt answers"
            )
        if self.loss_weights != LossWeights():
            yield (
                "stage.loss_weights mean nothing here: every sampled token counts as "
                "stage.loss.aggregation says"
            )
