"""The answers of ``emu35 plan``, as one flat-enough JSON object and as a page for people."""

from collections.abc import Iterator, Mapping
from typing import Any

from emu35.config.data import TokenDataConfig
from emu35.config.dida import row_length
from emu35.config.dida_eval import DiDAEvalConfig
from emu35.config.grpo import GRPOConfig
from emu35.config.model import LMConfig
from emu35.config.prompts import PromptDataConfig
from emu35.config.root import RunConfig
from emu35.config.stage import (
    IBQStageConfig,
    LMStageConfig,
    Precision,
    StageConfig,
    adapters_of,
)
from emu35.config.tokenizer_eval import TokenizerEvalConfig
from emu35.errors import ConfigError
from emu35.model.shapes import adapter_count
from emu35.planner.memory import (
    GRADIENT_BYTES,
    MAIN_COPY_BYTES,
    MOMENT_BYTES,
    Memory,
    language_model_memory,
    weight_bytes,
)
from emu35.planner.parameters import count_parameters, rank_parameters
from emu35.tokens.vocabulary import vocabulary_of

GIB = 2**30


def make_plan(config: RunConfig) -> dict[str, Any]:
    """Sizes of the validated ``config``: JSON-ready; bytes are those of the fullest rank.

    Raises:
        ConfigError: its stage trains nothing.
    """
    if isinstance(config.stage, DiDAEvalConfig | TokenizerEvalConfig):
        raise ConfigError(
            f"stage={config.stage.kind} trains nothing, so there is nothing to plan; plan the run "
            "that it evaluates"
        )
    vocabulary_size = vocabulary_of(config.tokenizer).size
    parameters = count_parameters(config.model, vocabulary_size=vocabulary_size)
    world = config.launch.world_size
    data_parallel = world // config.parallel.model_ranks
    stage = config.stage
    plan: dict[str, Any] = {
        "name": config.name,
        "stage": stage.kind,
        "parameters": parameters,
        "vocabulary_size": vocabulary_size,
        "steps": stage.steps,
        **_batch(stage, data_parallel=data_parallel),
        "world_size": world,
        "data_parallel": data_parallel,
        "tensor_parallel": config.parallel.tp,
        "pipeline_parallel": config.parallel.pp,
        "context_parallel": config.parallel.cp,
    }
    if isinstance(stage, GRPOConfig):
        assert isinstance(config.data, PromptDataConfig)
        plan |= {
            "sequence_length": config.data.sequence_length,
            "answers_per_step": plan["global_batch_size"],
            "answers": plan["global_batch_size"] * stage.steps,
        }
    elif isinstance(config.data, TokenDataConfig):
        tokens = stage.global_batch_size * config.data.sequence_length
        plan |= {
            "sequence_length": config.data.sequence_length,
            "tokens_per_step": tokens,
            "tokens": tokens * stage.steps,
        }
    else:
        plan |= {
            "images_per_step": stage.global_batch_size,
            "images": stage.global_batch_size * stage.steps,
        }
    if (lora := adapters_of(stage)) and isinstance(config.model, LMConfig):
        plan["trained_parameters"] = adapter_count(config.model, lora=lora)
    memory = _memory(config, parameters=parameters, data_parallel=data_parallel)
    plan["memory_bytes_per_rank"] = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "logits": memory.logits,
        "total": memory.total,
    }
    if isinstance(stage, GRPOConfig) and stage.keeps_reference:
        sizes = plan["memory_bytes_per_rank"]
        total = sizes.pop("total") + memory.weights
        sizes |= {"reference": memory.weights, "total": total}
    if isinstance(stage, IBQStageConfig):
        sizes = plan["memory_bytes_per_rank"]
        total = sizes.pop("total") + memory.weights
        sizes |= {"average": memory.weights, "total": total}
    return plan


def _batch(stage: StageConfig, *, data_parallel: int) -> dict[str, int]:
    """Sequences of a step and how many micro-batches a replica makes of them. How many answers
    share a row is not known beforehand: one a row is the most that it can take."""
    size = stage.global_batch_size
    if isinstance(stage, GRPOConfig):
        size = stage.prompts_per_step * stage.rollouts_per_prompt
    return {
        "global_batch_size": size,
        "micro_batches": max(1, size // (data_parallel * stage.micro_batch_size)),
    }


def _memory(config: RunConfig, *, parameters: int, data_parallel: int) -> Memory:
    model, stage, data = config.model, config.stage, config.data
    if isinstance(model, LMConfig):
        assert isinstance(stage, LMStageConfig)
        assert isinstance(data, TokenDataConfig | PromptDataConfig)
        vocabulary_size = vocabulary_of(config.tokenizer).size
        return language_model_memory(
            model,
            stage=stage,
            parallel=config.parallel,
            engine=config.engine,
            held=rank_parameters(model, vocabulary_size=vocabulary_size, parallel=config.parallel),
            vocabulary_size=vocabulary_size,
            sequence_length=row_length(stage, data=data),
            data_parallel=data_parallel,
            micro_batches=_batch(stage, data_parallel=data_parallel)["micro_batches"],
        )
    # A convolutional network's activations depend on the picture far more than on the weights;
    # no formula is given rather than a wrong one.
    # Weights stay in fp32, whatever the activations are. DeepSpeed keeps a copy of a rank's share.
    split = config.parallel.zero1 and data_parallel > 1
    each = MOMENT_BYTES + (MAIN_COPY_BYTES if split else 0)
    return Memory(
        weights=parameters * weight_bytes(Precision.fp32),
        gradients=parameters * GRADIENT_BYTES,
        optimizer=-(-parameters * each // (data_parallel if split else 1)),
        activations=None,
        logits=0,
    )


def describe(plan: Mapping[str, Any]) -> str:
    """``plan`` for a terminal."""
    return "\n".join(_lines(plan))


def _lines(plan: Mapping[str, Any]) -> Iterator[str]:
    yield f"{plan['name']} (stage {plan['stage']})"
    yield _row("parameters", f"{plan['parameters']:,}")
    if "trained_parameters" in plan:
        yield _row("trained", f"{plan['trained_parameters']:,} in adapters, the rest is frozen")
    yield _row("vocabulary", f"{plan['vocabulary_size']:,}")
    layout = " x ".join(
        f"{short} {plan[name]}"
        for short, name in (
            ("tp", "tensor_parallel"),
            ("pp", "pipeline_parallel"),
            ("cp", "context_parallel"),
            ("dp", "data_parallel"),
        )
    )
    yield _row("ranks", f"{plan['world_size']:,} = {layout}")
    batch = f"{plan['global_batch_size']:,} in {plan['micro_batches']} micro-batches a replica"
    yield _row("global batch", batch)
    unit = next(unit for unit in ("tokens", "answers", "images") if unit in plan)
    yield _row(f"{unit} per step", f"{plan[f'{unit}_per_step']:,}")
    yield _row("steps", f"{plan['steps']:,}")
    yield _row(f"{unit} in all", f"{plan[unit]:,}")
    yield "memory of the fullest rank"
    for name, size in plan["memory_bytes_per_rank"].items():
        yield _row(f"  {name}", "not estimated" if size is None else _size(size))


def _row(name: str, value: str) -> str:
    return f"  {name:<18} {value}"


def _size(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"
