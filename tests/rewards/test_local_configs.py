"""The local rewards in a configuration, as an experiment names them."""

import shutil
from pathlib import Path

import pytest
from reward_samples import sample, words

from emu35.config.grpo import GRPOConfig
from emu35.config.reward_kinds import REWARD_KINDS
from emu35.config.reward_local import (
    AestheticsRewardConfig,
    FacesRewardConfig,
    OcrRewardConfig,
    SimilarityRewardConfig,
)
from emu35.errors import ConfigError
from emu35.rewards.build import build_rewards, find_reward
from emu35.run.compose import compose, find_configs

KINDS = [
    "ocr",
    "ocr_layout",
    "faces",
    "identity",
    "aesthetics",
    "aesthetics_model",
    "similarity",
    "preservation",
]

PATHS = """
stage:
  rewards:
    my_identity: {embedder: faces.onnx}
    my_aesthetics_model: {model: clip, head: head.pth}
    my_similarity: {model: clip}
"""


def experiment(folder: Path, *, text: str = "") -> Path:
    """Configs with an experiment ``all`` that adds every local reward to the demo's."""
    configs = folder / "configs"
    shutil.copytree(find_configs(), configs)
    rewards = "".join(f"  - /reward@stage.rewards.my_{kind}: {kind}\n" for kind in KINDS)
    body = f"# @package _global_\ndefaults:\n  - demo/grpo\n{rewards}{text}"
    (configs / "experiment" / "all.yaml").write_text(body, encoding="utf-8")
    return configs


def test_an_experiment_may_name_every_local_reward(tmp_path: Path) -> None:
    config = compose(
        ["experiment=all", "stage.rewards.my_ocr.side=64"],
        configs=experiment(tmp_path, text=PATHS),
    )
    assert isinstance(config.stage, GRPOConfig)
    rewards = config.stage.rewards
    for kind in KINDS:
        assert type(rewards[f"my_{kind}"]) is REWARD_KINDS[kind]
        assert rewards[f"my_{kind}"].kind == kind
    ocr = rewards["my_ocr"]
    assert isinstance(ocr, OcrRewardConfig)
    assert ocr.side == 64


def test_everything_that_is_missing_or_wrong_is_told_at_once(tmp_path: Path) -> None:
    wrong = [
        "stage.rewards.my_ocr.confidence=1.5",
        "stage.rewards.my_ocr_layout.good_overlap=0",
        "stage.rewards.my_identity.channels=cmyk",
        "stage.rewards.my_faces.neighbours=0",
        "stage.rewards.my_preservation.lpips_heads=alex.pth",
        *(
            f"stage.rewards.my_aesthetics.{part}=0"
            for part in ("sharpness", "exposure", "contrast", "colourfulness")
        ),
    ]
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=all", *wrong], configs=experiment(tmp_path))
    told = "\n".join(caught.value.problems)
    for where in (
        "my_ocr.confidence=1.5",
        "my_ocr_layout.good_overlap=0",
        "my_identity.embedder is empty",
        "my_identity.channels='cmyk'",
        "my_faces.neighbours=0",
        "my_preservation: LPIPS needs",
        "my_aesthetics: all weights are 0",
        "my_aesthetics_model.model is empty",
        "my_aesthetics_model.head is empty",
        "my_similarity.model is empty",
    ):
        assert f"stage.rewards.{where}" in told, (where, told)


def test_rewards_that_cannot_be_made_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build_rewards(
            {
                "looks": AestheticsRewardConfig(),
                "people": FacesRewardConfig(detector=str(tmp_path / "yunet.onnx")),
                "likeness": SimilarityRewardConfig(model=str(tmp_path)),
            }
        )
    first, second = caught.value.problems
    assert first.startswith("stage.rewards.people: ")
    assert "yunet.onnx" in first
    assert second.startswith("stage.rewards.likeness: ")
    assert "config.json" in second


def test_a_command_finds_those_that_need_nothing_configured() -> None:
    pytest.importorskip("rapidocr", reason="needs the extra 'rewards'")
    assert find_reward("ocr").score(sample(words("BUS"), text="BUS")) == 1.0
    with pytest.raises(ConfigError, match="'identity' has to be configured"):
        find_reward("identity")
