"""Edits that keep what they should, and edits that do not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reward_samples import numbers, sample, words
from skimage.metrics import structural_similarity

from emu35.config.reward_local import PreservationRewardConfig
from emu35.errors import ConfigError
from emu35.rewards.preservation import PreservationReward
from emu35.rewards.sample import Picture, Unscored
from emu35.vision.lpips import CONVOLUTIONS, Backbone

BEFORE = words("TAXI", "BUS", side=96, colour="blue")
LEFT = [0, 0, 0.5, 1]


def painted(*, columns: slice) -> Picture:
    after = BEFORE.copy()
    after[:, columns] = np.random.default_rng(0).integers(0, 256, after[:, columns].shape)
    return after


INSIDE = painted(columns=slice(0, 48))
OUTSIDE = painted(columns=slice(48, 96))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random weights with LPIPS's names and shapes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lpips")
    network: dict[str, torch.Tensor] = {"classifier.1.weight": torch.ones(2, 2)}
    heads: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(CONVOLUTIONS[Backbone.alexnet]):
        number, out, into, kernel = layer.number, layer.outputs, layer.inputs, layer.kernel
        weight = torch.randn(out, into, kernel, kernel) * (2 / (into * kernel * kernel)) ** 0.5
        network[f"features.{number}.weight"] = weight
        network[f"features.{number}.bias"] = torch.randn(out) * 0.1
        heads[f"lin{index}.model.1.weight"] = torch.rand(1, out, 1, 1) / out
    torch.save(network, folder / "alexnet.pth")
    torch.save(heads, folder / "alex.pth")
    return {
        "lpips_network": str(folder / "alexnet.pth"),
        "lpips_heads": str(folder / "alex.pth"),
    }


def configured(files: dict[str, str] | None) -> PreservationRewardConfig:
    if files is None:
        return PreservationRewardConfig()
    return PreservationRewardConfig(
        lpips_network=files["lpips_network"], lpips_heads=files["lpips_heads"]
    )


@pytest.fixture(scope="module", params=["ssim", "ssim and lpips"])
def reward(request: pytest.FixtureRequest, weights: dict[str, str]) -> PreservationReward:
    return PreservationReward(configured(weights if request.param != "ssim" else None))


def edit(after: Picture, **record: Any):
    return sample(after, references=(BEFORE,), images=["before.png"], **record)


def test_only_changes_outside_of_the_region_cost_anything(reward: PreservationReward) -> None:
    same, inside, outside, everywhere = numbers(
        reward,
        edit(BEFORE),
        edit(INSIDE, region=LEFT),
        edit(OUTSIDE, region=LEFT),
        edit(INSIDE),
    )
    assert same == inside == pytest.approx(1)
    assert outside < 0.6
    assert outside < everywhere < 0.9


def test_several_boxes_and_masks_say_the_same(reward: PreservationReward, tmp_path: Path) -> None:
    mask = np.zeros((96, 96), dtype=np.uint8)
    mask[:, :48] = 255
    Image.fromarray(mask).resize((48, 48), Image.Resampling.NEAREST).save(tmp_path / "left.png")
    both = [[0, 0, 0.5, 0.5], [0, 0.5, 0.5, 1]]
    by_mask = edit(OUTSIDE, mask=str(tmp_path / "left.png"))
    scores = numbers(reward, edit(OUTSIDE, region=LEFT), edit(OUTSIDE, region=both), by_mask)
    assert scores[0] == scores[1] == scores[2]


def test_masks_are_found_in_their_folder_and_must_leave_something(tmp_path: Path) -> None:
    reward = PreservationReward(PreservationRewardConfig(masks=str(tmp_path)))
    Image.new("L", (8, 8), 255).save(tmp_path / "all.png")
    Image.new("L", (8, 8), 0).save(tmp_path / "none.png")
    asked = {"images": ["before.png"]}
    (problem,) = reward.problems({**asked, "mask": "all.png"})
    assert "white everywhere" in problem
    assert reward.problems({**asked, "mask": "none.png"}) == []
    masked, plain = numbers(reward, edit(INSIDE, mask="none.png"), edit(INSIDE))
    assert masked == plain


def test_ssim_is_scikit_images_over_a_picture_without_region() -> None:
    reward = PreservationReward(PreservationRewardConfig())
    wanted = structural_similarity(BEFORE, INSIDE, channel_axis=2, data_range=255, full=True)[1]
    assert numbers(reward, edit(INSIDE)) == pytest.approx([float(wanted.mean())])


def test_the_original_takes_the_size_of_the_answer(reward: PreservationReward) -> None:
    half = np.asarray(Image.fromarray(BEFORE).resize((48, 48), Image.Resampling.BICUBIC))
    other = words("SHOP", side=96)
    (score,) = numbers(reward, edit(half))
    assert score == pytest.approx(1, abs=1e-6)
    second = sample(half, references=(other, BEFORE), images=["a", "b"], source=1)
    assert numbers(reward, second)[0] == score


def test_what_cannot_be_compared_has_no_score(reward: PreservationReward) -> None:
    tiny = BEFORE[:5, :5]
    answers = [
        sample(references=(BEFORE,)),
        sample(BEFORE),
        edit(BEFORE, source=1),
        edit(tiny),
        edit(BEFORE, region=[0, 0, 1, 0.999]),
    ]
    scores = reward.score(answers)
    assert all(isinstance(score, Unscored) for score in scores), scores


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "add images"),
        ({"images": ["a"], "source": 1}, "none of its 1 images"),
        ({"images": "a", "source": -1}, "number of a picture"),
        ({"images": ["a"], "region": LEFT, "mask": "m.png"}, "give one"),
        ({"images": ["a"], "region": [0, 0, 40, 40]}, "must lie in"),
        ({"images": ["a"], "region": [LEFT, [1, 2]]}, "four numbers"),
        ({"images": ["a"], "region": "left"}, "must be a box"),
        ({"images": ["a"], "region": [0, 0, 1, 1]}, "nothing is left"),
        ({"images": ["a"], "mask": 7}, "path of a picture"),
        ({"images": ["a"], "mask": "gone.png"}, "cannot be read"),
    ],
)
def test_records_that_say_nothing_to_compare_are_told_beforehand(
    reward: PreservationReward, record: dict[str, object], message: str
) -> None:
    (problem,) = reward.problems(record)
    assert message in problem
    assert reward.problems({"images": ["a"], "region": LEFT}) == []


def test_weights_that_are_not_lpips_are_refused(weights: dict[str, str]) -> None:
    twice = {"lpips_network": weights["lpips_heads"], "lpips_heads": weights["lpips_heads"]}
    with pytest.raises(ConfigError, match=r"alex\.pth.* features\.0\.weight is missing"):
        PreservationReward(configured(twice))
    assert list(PreservationRewardConfig(lpips_heads="a.pth").problems("kept"))
