"""The perceptual term as the stage builds it: LPIPS from files, and its stand-in."""

from pathlib import Path

import pytest
import torch
from random_lpips import random_lpips
from safetensors.torch import save_file

from emu35.config.tokenizer_objective import PerceptualConfig, PerceptualKind
from emu35.errors import ConfigError
from emu35.vision.ibq.objective.perceptual import RandomFeatureDistance, build_perceptual
from emu35.vision.lpips import Backbone, Lpips

CPU = torch.device("cpu")


def pictures(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, 3, 24, 32, generator=generator) * 2 - 1
    return torch.nn.functional.avg_pool2d(noise, 3, 1, 1)


def test_nothing_is_read_at_weight_zero() -> None:
    assert build_perceptual(PerceptualConfig(weights="/nowhere"), device=CPU) is None


def test_lpips_comes_from_the_files_that_are_named(tmp_path: Path) -> None:
    tensors = random_lpips(Backbone.vgg16)
    save_file(tensors, tmp_path / "both.safetensors")
    config = PerceptualConfig(weight=1.0, weights=str(tmp_path / "both.safetensors"))
    distance = build_perceptual(config, device=CPU)
    assert isinstance(distance, Lpips)
    a, b = pictures(), pictures().flip(0)
    expected = Lpips(Backbone.vgg16, tensors=tensors, origin="random").distance(a, b)
    assert torch.equal(distance(a, target_BCHW=b), expected)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    config = PerceptualConfig(weight=1.0, weights=str(tmp_path / "vgg.pth"))
    with pytest.raises(ConfigError, match=r"stage\.perceptual: there is no file .*vgg\.pth"):
        build_perceptual(config, device=CPU)


def stand_in(seed: int = 0) -> RandomFeatureDistance:
    config = PerceptualConfig(weight=1.0, kind=PerceptualKind.random_features, seed=seed)
    distance = build_perceptual(config, device=CPU)
    assert isinstance(distance, RandomFeatureDistance)
    return distance


def test_stand_in_is_a_distance_of_structure() -> None:
    """Equal pictures have distance 0, and blur costs more than a brighter picture as far away."""
    a = (torch.arange(32) // 2 % 2 - 0.5).expand(1, 3, 24, 32)
    blurred = torch.nn.functional.avg_pool2d(a, 5, 1, 2)
    brighter = a + (blurred - a).abs().mean()
    distance = stand_in()
    assert float(distance(a, target_BCHW=a)) == 0
    lost = float(distance(blurred, target_BCHW=a))
    kept = float(distance(brighter, target_BCHW=a))
    assert 0 < kept < lost <= 2


def test_stand_in_depends_on_its_seed_alone() -> None:
    a, b = pictures(), pictures().flip(0)
    torch.manual_seed(1)
    first = stand_in()(a, target_BCHW=b)
    torch.manual_seed(2)
    assert torch.equal(stand_in()(a, target_BCHW=b), first)
    assert not torch.equal(stand_in(seed=1)(a, target_BCHW=b), first)


def test_stand_in_has_a_bounded_gradient_for_reconstructions_alone() -> None:
    """Grey areas have pixels of 0 and hardly any features; dividing by their length would make
    noise of a millionth count as much as edges."""
    grey = torch.zeros(1, 3, 24, 32)
    own = (grey + 1e-6 * pictures(1)).requires_grad_()
    target = pictures(1).requires_grad_()
    distance = stand_in()
    distance(own, target_BCHW=target).mean().backward()
    assert own.grad is not None
    assert target.grad is None
    assert 0 < float(own.grad.norm()) < 1
    assert list(distance.parameters()) == []
    assert distance.state_dict() == {}


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (33, 17)])
def test_stand_in_takes_pictures_of_any_size(size: tuple[int, int]) -> None:
    a = torch.rand(1, 3, *size)
    assert stand_in()(a, target_BCHW=1 - a).isfinite().all()


def test_descent_on_the_distance_restores_the_picture() -> None:
    """What the gradient is for."""
    target = pictures(1)
    own = torch.zeros_like(target).requires_grad_()
    optimizer = torch.optim.Adam([own], lr=0.02)
    distance = stand_in()
    before = float((own - target).abs().mean().detach())
    for _ in range(60):
        optimizer.zero_grad()
        distance(own, target_BCHW=target).mean().backward()
        optimizer.step()
    assert float((own - target).abs().mean().detach()) < 0.7 * before
