"""Numbers of reinforcement learning that make no sense are told before anything is read."""

import pytest

from emu35.errors import ConfigError
from emu35.run.compose import compose


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.evaluation.samples=0", "stage.evaluation.samples=0 is too small"),
        ("stage.evaluation.max_prompts=0", "stage.evaluation.max_prompts=0 is too small"),
        ("stage.evaluation.patience=-1", "stage.evaluation.patience=-1 is too small"),
        ("stage.evaluation.min_gain=nan", "stage.evaluation.min_gain=nan must be a finite number"),
        ("stage.rollout.batch_size=0", "stage.rollout.batch_size=0 is too small"),
        ("stage.rollout.cache_tokens=0", "stage.rollout.cache_tokens=0 is too small"),
        ("stage.rollout.temperature=nan", "stage.rollout.temperature=nan must be a finite number"),
        ("stage.rollout.top_p=nan", "stage.rollout.top_p=nan must be a finite number"),
        ("stage.rollout.timeout=nan", "stage.rollout.timeout=nan must be a finite number"),
        ("stage.loss.kl_weight=nan", "stage.loss.kl_weight=nan must be a finite number"),
        ("stage.loss.kl_clamp=nan", "stage.loss.kl_clamp=nan must be a finite number"),
        ("stage.loss.dual_clip=nan", "stage.loss.dual_clip=nan must be a finite number"),
        ("stage.loss.clip_low=1.5", "stage.loss.clip_low=1.5 must lie below 1"),
        ("stage.drift.mean=nan", "stage.drift.mean=nan must be a finite number"),
        ("stage.advantage.epsilon=nan", "stage.advantage.epsilon=nan must be a finite number"),
        ("stage.max_unscored=nan", "stage.max_unscored=nan must be a finite number"),
        ("model.hidden_dropout=0.1", "model.hidden_dropout=0.1 makes ratios"),
        ("model.attention_dropout=0.1", "model.attention_dropout=0.1 makes ratios"),
    ],
)
def test_a_number_that_makes_no_sense_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose(["experiment=demo/grpo", override])
    assert any(message in problem for problem in raised.value.problems)


def test_adapters_train_without_dropout() -> None:
    lora = ["stage.adapter=lora", "stage.reference=adapter_off"]
    compose(["experiment=demo/grpo", *lora])
    with pytest.raises(ConfigError, match=r"stage.lora.dropout=0.1 makes ratios"):
        compose(["experiment=demo/grpo", *lora, "stage.lora.dropout=0.1"])
