"""What a run does: one class a stage."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from emu35.config.check import at_least, fraction
from emu35.config.tokenizer_objective import (
    AdversarialConfig,
    DistillationConfig,
    EntropyConfig,
    PerceptualConfig,
)


class Precision(StrEnum):
    """Parameter and activation type; gradients and optimizer state are fp32 in both."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """What every trained stage shares. Batch sizes count sequences (pictures for ``ibq``).

    Validation comes every ``validate_every`` steps (0: never) and at the end; with
    ``validate_first`` before the first step as well, so that curves begin where the run does.
    """

    kind: str = "pretrain"
    steps: int = 100
    global_batch_size: int = 8
    micro_batch_size: int = 1
    validate_every: int = 100
    validate_first: bool = False
    precision: Precision = Precision.fp32
    init_from: str | None = None

    def problems(self) -> Iterator[str]:
        yield from at_least(
            "stage",
            1,
            steps=self.steps,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
        )
        yield from at_least("stage", 0, validate_every=self.validate_every)


@dataclass(kw_only=True, slots=True)
class LossWeights:
    """Weight of a label token by its modality (paper section 3.2: visual 0.5, text 1.0).

    ``layout`` covers the grid tokens around the codes (BOI, size, IMG, EOL, EOI) and ``control``
    the document markers; both live in the text vocabulary, hence the text weight by default.
    """

    text: float = 1.0
    visual: float = 0.5
    layout: float = 1.0
    control: float = 1.0

    def problems(self) -> Iterator[str]:
        yield from at_least(
            "stage.loss_weights",
            0,
            text=self.text,
            visual=self.visual,
            layout=self.layout,
            control=self.control,
        )


class NewRows(StrEnum):
    """Where vocabulary rows start that the initial weights do not have: the ``mean`` of the
    text rows plus noise, so that no new id outbids all known ones, or ``normal``, noise alone."""

    mean = "mean"
    normal = "normal"


@dataclass(kw_only=True, slots=True)
class NewRowsConfig:
    """Rows for the ids that Qwen3 does not have, in the embedding and in the output layer.

    ``std`` is the standard deviation of the noise. The embedding row of PAD is zero in any case.
    """

    policy: NewRows = NewRows.mean
    std: float = 0.02

    def problems(self) -> Iterator[str]:
        yield from at_least("stage.new_rows", 0, std=self.std)


class Adapter(StrEnum):
    """What is trained: ``none``, all weights; ``lora``, low-rank additions to frozen ones;
    ``lora_noisy_only`` (stage=dida), additions that only noisy copies of pictures pass through, so
    that everything generated token by token stays as it was, bit for bit."""

    none = "none"
    lora = "lora"
    lora_noisy_only = "lora_noisy_only"


class LoRATarget(StrEnum):
    """Linear layers that can have an addition, by megatron-core's names: query, key and value in
    one, the attention's output, gate and up projection in one, the down projection."""

    linear_qkv = "linear_qkv"
    linear_proj = "linear_proj"
    linear_fc1 = "linear_fc1"
    linear_fc2 = "linear_fc2"


@dataclass(kw_only=True, slots=True)
class LoRAConfig:
    """Low-rank adaptation (arXiv 2106.09685): W x + (alpha / rank) B A dropout(x)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[LoRATarget] = field(default_factory=lambda: list(LoRATarget))

    def problems(self) -> Iterator[str]:
        yield from at_least("stage.lora", 1, rank=self.rank)
        if self.alpha <= 0:
            yield f"stage.lora.alpha={self.alpha} must be positive"
        if not 0 <= self.dropout < 1:
            yield f"stage.lora.dropout={self.dropout} must lie in [0, 1)"
        if not self.targets or len(set(self.targets)) != len(self.targets):
            names = ", ".join(LoRATarget)
            yield f"stage.lora.targets={list(self.targets)} must name some of {names}, each once"


@dataclass(kw_only=True, slots=True)
class LMStageConfig(StageConfig):
    """What pretraining and fine-tuning share: next-token prediction with weights by modality.

    ``init_from`` names a run, a release in the official format, or a Qwen3 folder as published, for
    which ``new_rows`` completes the vocabulary. With an ``adapter`` only the additions that
    ``lora`` describes are trained. ``loss_chunk`` is the number of token rows projected onto the
    vocabulary at a time.
    """

    loss_weights: LossWeights = field(default_factory=LossWeights)
    loss_chunk: int = 1024
    new_rows: NewRowsConfig = field(default_factory=NewRowsConfig)
    adapter: Adapter = Adapter.none
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def problems(self) -> Iterator[str]:
        # Zero-argument super() fails in slotted dataclasses (the class is rebuilt).
        yield from StageConfig.problems(self)
        yield from self.loss_weights.problems()
        yield from self.new_rows.problems()
        yield from self.lora.problems()
        yield from at_least("stage", 1, loss_chunk=self.loss_chunk)


def adapters_of(stage: StageConfig) -> LoRAConfig | None:
    """The adapters that ``stage`` trains; None where it trains all weights."""
    if isinstance(stage, LMStageConfig) and stage.adapter is not Adapter.none:
        return stage.lora
    return None


def adapts_noisy_only(stage: StageConfig) -> bool:
    """Whether adapters add to the rows of noisy copies alone."""
    return isinstance(stage, LMStageConfig) and stage.adapter is Adapter.lora_noisy_only


@dataclass(kw_only=True, slots=True)
class PretrainConfig(LMStageConfig):
    """Next-token prediction over every token of packed documents (paper section 3.2)."""

    kind: str = "pretrain"


@dataclass(kw_only=True, slots=True)
class SFTConfig(LMStageConfig):
    """Supervised fine-tuning: the loss covers the response only (paper section 4.1)."""

    kind: str = "sft"


@dataclass(kw_only=True, slots=True)
class IBQStageConfig(StageConfig):
    """Image tokenizer training (paper sections 2.3 and 5.2), a weight for each term of its loss.

    The first ``quantizer_warmup`` of the steps (a share, below 1) train encoder and decoder without
    the quantizer; the codebook then starts from the latent vectors. 0 quantizes from the first
    step, with a random codebook, and suits long runs only. ``mse_weight`` adds the squared error
    to the absolute one. Terms that have a section of their own are off until it gives them a
    weight. ``ema_decay`` is that of the averaged weights, which are validated and released.
    """

    kind: str = "ibq"
    quantizer_warmup: float = 0.0
    reconstruction_weight: float = 1.0
    mse_weight: float = 0.0
    quantization_weight: float = 1.0
    commitment: float = 0.25
    ema_decay: float = 0.999
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)

    def problems(self) -> Iterator[str]:
        yield from StageConfig.problems(self)
        for term in (self.perceptual, self.adversarial, self.distillation, self.entropy):
            yield from term.problems()
        yield from at_least(
            "stage",
            0,
            reconstruction_weight=self.reconstruction_weight,
            mse_weight=self.mse_weight,
            quantization_weight=self.quantization_weight,
            commitment=self.commitment,
        )
        if not self.reconstruction_weight + self.mse_weight + self.perceptual.weight > 0:
            yield (
                "stage.reconstruction_weight, mse_weight and perceptual.weight are 0, so that "
                "nothing compares reconstructions with pictures; give one a weight"
            )
        yield from fraction("stage", quantizer_warmup=self.quantizer_warmup)
        if not 0 <= self.ema_decay < 1:
            yield f"stage.ema_decay={self.ema_decay} must lie in [0, 1)"
