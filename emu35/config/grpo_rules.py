"""Rules of reinforcement learning that span sections."""

from collections.abc import Iterator

from emu35.config.grpo import EngineKind, GRPOConfig, Mode, Reference
from emu35.config.model import LMConfig
from emu35.config.prompts import PromptDataConfig, PromptTaskConfig
from emu35.config.root import RunConfig
from emu35.config.schema import did_you_mean
from emu35.config.stage import Adapter


def grpo_problems(config: RunConfig, *, stage: GRPOConfig) -> Iterator[str]:
    """What is wrong between ``stage`` and the other sections."""
    data = config.data
    if not isinstance(data, PromptDataConfig):
        yield f"stage=grpo reads prompts, but data.kind={data.kind}; use data=prompts"
        return
    if stage.init_from is None:
        yield (
            "stage=grpo improves a model that can already answer, but stage.init_from names none; "
            "name a run or a release"
        )
    if not data.tasks:
        yield "data.tasks is empty; name at least one file of prompts (data.tasks.NAME.path)"
    for kind, tasks in (("tasks", data.tasks), ("validation", data.validation)):
        for name, task in tasks.items():
            yield from _unknown_rewards(task, where=f"data.{kind}.{name}", stage=stage)
    if config.tokenizer.vision is None:
        yield (
            "stage=grpo decodes pictures for its rewards, but tokenizer.vision names no image "
            "tokenizer; name its folder"
        )
    yield from _engines(stage)
    if stage.reference is Reference.adapter_off and stage.adapter is not Adapter.lora:
        yield (
            "stage.reference=adapter_off has no adapter to turn off; use copy, or "
            "stage.adapter=lora"
        )
    if stage.adapter is Adapter.lora_noisy_only:
        yield (
            "stage.adapter=lora_noisy_only adapts parallel decoding; stage=grpo takes none or lora"
        )
    yield from _dropout(config, stage=stage)
    yield from _early_stopping(stage, data=data)


def _early_stopping(stage: GRPOConfig, *, data: PromptDataConfig) -> Iterator[str]:
    patience, watched = stage.evaluation.patience, stage.evaluation.watch
    if patience and not data.validation:
        yield (
            f"stage.evaluation.patience={patience} counts validations, but data.validation is "
            "empty; name a file of prompts (data.validation.NAME.path), or use patience=0"
        )
    if patience and stage.validate_every < 1:
        yield (
            f"stage.evaluation.patience={patience} counts validations, but "
            f"stage.validate_every={stage.validate_every} makes none before the end; validate "
            "every so many steps, or use patience=0"
        )
    if watched is None:
        if patience and data.validation and not any(t.rewards for t in data.validation.values()):
            yield (
                f"stage.evaluation.patience={patience} watches the trained rewards of "
                "data.validation, but all of them are held out; name one in "
                "stage.evaluation.watch (SET/REWARD)"
            )
        return
    name, slash, reward = watched.partition("/")
    task = data.validation.get(name)
    if task is None:
        known = ", ".join(data.validation) or "none"
        yield (
            f"stage.evaluation.watch={watched!r} is no set of data.validation (there are: {known})."
            f"{did_you_mean(name, data.validation)}"
        )
    elif slash and reward not in (own := [*task.rewards, *task.held_out]):
        yield (
            f"stage.evaluation.watch={watched!r} is nothing that data.validation.{name} measures "
            f"(its rewards: {', '.join(own) or 'none'}); name one of them, or give it that one"
        )
    elif not slash and not task.rewards:
        yield (
            f"stage.evaluation.watch={watched!r} is the mean of trained rewards, but all of "
            f"data.validation.{name} are held out; name one behind a slash (SET/REWARD)"
        )


def _dropout(config: RunConfig, *, stage: GRPOConfig) -> Iterator[str]:
    """Ratios compare the policy with itself: noise in one of the two is no learning."""
    if isinstance(config.model, LMConfig):
        for name in ("hidden_dropout", "attention_dropout"):
            if value := getattr(config.model, name):
                yield f"model.{name}={value} makes ratios of stage=grpo noise; use 0"
    if stage.adapter is not Adapter.none and stage.lora.dropout:
        yield f"stage.lora.dropout={stage.lora.dropout} makes ratios of stage=grpo noise; use 0"


def _engines(stage: GRPOConfig) -> Iterator[str]:
    rollout = stage.rollout
    if rollout.engine is EngineKind.remote and not rollout.servers:
        yield "stage.rollout.engine=remote samples on servers; name them in stage.rollout.servers"
    for url in rollout.servers:
        if not url.startswith(("http://", "https://")):
            yield f"stage.rollout.servers: {url!r} is no address; write http://HOST:PORT"
    if len(set(rollout.servers)) < len(rollout.servers):
        yield "stage.rollout.servers names a server twice; it would be given each update twice"
    for name, value in (("timeout", rollout.timeout), ("bucket_bytes", rollout.bucket_bytes)):
        if not value > 0:
            yield f"stage.rollout.{name}={value} must be positive"
    if stage.mode is Mode.train_only and rollout.replay is None:
        yield (
            "stage.mode=train_only trains on saved answers; name their folder in "
            "stage.rollout.replay"
        )
    if rollout.replay is not None and stage.mode is not Mode.train_only:
        yield f"stage.rollout.replay holds for stage.mode=train_only, not {stage.mode}; drop one"


def _unknown_rewards(task: PromptTaskConfig, *, where: str, stage: GRPOConfig) -> Iterator[str]:
    for name in [*task.rewards, *task.held_out]:
        if name not in stage.rewards:
            known = ", ".join(stage.rewards) or "none"
            yield (
                f"{where} names reward {name!r}, which stage.rewards does not have (it has: "
                f"{known}).{did_you_mean(name, stage.rewards)}"
            )
