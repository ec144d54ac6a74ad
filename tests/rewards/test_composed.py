"""Rewards in a run's configuration: by experiment file and from the command line."""

from pathlib import Path

import pytest

from emu35.config.grpo import GRPOConfig
from emu35.config.reward_kinds import REWARD_KINDS
from emu35.config.reward_remote import JudgeRewardConfig, SimilarityEndpointRewardConfig
from emu35.errors import ConfigError
from emu35.rewards.build import MAKERS
from emu35.run.compose import compose, find_configs

MINE = """
# @package _global_
defaults:
  - /experiment/demo/grpo
  - /reward@stage.rewards.taste: judge
stage:
  rewards:
    taste: {base_url: "http://judge:8000/v1", model: vlm, form: line, scale_high: 5.0}
data:
  tasks:
    words: {held_out: [taste]}
"""


def stage(*overrides: str, configs: Path | None = None) -> GRPOConfig:
    found = compose(overrides, configs=configs).stage
    assert isinstance(found, GRPOConfig)
    return found


def test_every_kind_has_a_maker_and_a_file_that_names_it() -> None:
    assert REWARD_KINDS.keys() == MAKERS.keys()
    files = {path.stem for path in (find_configs() / "reward").glob("*.yaml")}
    assert REWARD_KINDS.keys() <= files
    for kind, cls in REWARD_KINDS.items():
        assert cls().kind == kind
        with pytest.raises(ConfigError) as caught:
            stage(
                "experiment=demo/grpo", f"+reward@stage.rewards.x={kind}", "stage.rewards.x.low=1"
            )
        assert "stage.rewards.x: low and high are one range" in str(caught.value)


def test_an_experiment_adds_a_reward_to_those_of_another(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(MINE)
    rewards = stage("experiment=mine", configs=tmp_path).rewards
    assert list(rewards) == ["scene", "ocr", "taste"]
    taste = rewards["taste"]
    assert isinstance(taste, JudgeRewardConfig)
    assert (taste.model, taste.form.value, taste.scale_high) == ("vlm", "line", 5.0)


def test_the_command_line_adds_and_drops_rewards() -> None:
    rewards = stage(
        "experiment=demo/grpo",
        "+reward@stage.rewards.clip=similarity_endpoint",
        "stage.rewards.clip.base_url=http://clip:8100",
        "stage.rewards.clip.low=0.1",
        "stage.rewards.clip.high=0.4",
        "~stage.rewards.ocr",
        "data.tasks.words.rewards={clip: 1.0}",
        "~data.tasks.words.rewards.ocr",
        "data.validation.words.rewards={clip: 1.0}",
        "~data.validation.words.rewards.ocr",
    ).rewards
    assert list(rewards) == ["scene", "clip"]
    assert isinstance(rewards["clip"], SimilarityEndpointRewardConfig)
    with pytest.raises(ConfigError, match=r"unknown reward 'juge'; .*Did you mean 'judge'"):
        stage("experiment=demo/grpo", "+reward@stage.rewards.x=juge")


def test_all_that_is_wrong_with_a_judge_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        stage(
            "experiment=demo/grpo",
            "+reward@stage.rewards.x=judge",
            "stage.rewards.x.batch_size=4",
            "stage.rewards.x.scale_low=10",
        )
    for problem in ("base_url='' is no address", "model is empty", "must be 1", "scale_high"):
        assert problem in str(caught.value)
