"""LPIPS against its paper's formula over torch's own modules, and what its gradient is worth."""

from pathlib import Path

import pytest
import torch
from random_lpips import random_lpips
from torch import nn

from emu35.errors import ConfigError
from emu35.vision.lpips import SCALE, SHIFT, SMALLEST, Backbone, Lpips, read_lpips

BOTH = list(Backbone)


def pictures(*, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, 2, 3, 38, 44, generator=generator) * 2 - 1
    return a, b


def lpips(backbone: Backbone) -> Lpips:
    return Lpips(backbone, tensors=random_lpips(backbone), origin="random")


def modules(backbone: Backbone) -> nn.Sequential:
    """torchvision's ``features``, as its model definitions list them."""
    conv, pool, relu = nn.Conv2d, nn.MaxPool2d, nn.ReLU
    if backbone is Backbone.alexnet:
        return nn.Sequential(
            *(conv(3, 64, 11, 4, 2), relu(), pool(3, 2)),
            *(conv(64, 192, 5, padding=2), relu(), pool(3, 2)),
            *(conv(192, 384, 3, padding=1), relu(), conv(384, 256, 3, padding=1), relu()),
            *(conv(256, 256, 3, padding=1), relu()),
        )
    parts: list[nn.Module] = []
    inputs = 3
    for outputs in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        if outputs == 0:
            parts.append(pool(2, 2))
            continue
        parts += [conv(inputs, outputs, 3, padding=1), relu()]
        inputs = outputs
    return nn.Sequential(*parts)


TAPPED = {Backbone.alexnet: (1, 4, 7, 9, 11), Backbone.vgg16: (3, 8, 15, 22, 29)}
"""Modules of ``features`` after which the paper compares."""


def plain_lpips(backbone: Backbone, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[B]: LPIPS as its paper has it, equation 1."""
    tensors = random_lpips(backbone)
    features = modules(backbone).requires_grad_(False)
    features.load_state_dict(
        {k.removeprefix("features."): v for k, v in tensors.items() if k.startswith("features.")}
    )
    shift, scale = (torch.tensor(values)[None, :, None, None] for values in (SHIFT, SCALE))
    x, y = (x - shift) / scale, (y - shift) / scale
    total, tap = torch.zeros(len(x)), 0
    for number, module in enumerate(features):
        x, y = module(x), module(y)
        if number in TAPPED[backbone]:
            apart = nn.functional.normalize(x) - nn.functional.normalize(y)
            head = tensors[f"lin{tap}.model.1.weight"][0, :, 0, 0]
            total = total + torch.einsum("bchw,c->bhw", apart**2, head).mean(dim=(1, 2))
            tap += 1
    assert tap == 5
    return total


@pytest.mark.parametrize("backbone", BOTH)
def test_it_is_the_papers_with_its_gradient(backbone: Backbone) -> None:
    a, b = pictures()
    ours, theirs = a.clone().requires_grad_(), a.clone().requires_grad_()
    distance, plain = lpips(backbone)(ours, target_BCHW=b), plain_lpips(backbone, theirs, b)
    torch.testing.assert_close(distance, plain, rtol=1e-4, atol=1e-6)
    (own,) = torch.autograd.grad(distance.mean(), ours)
    (expected,) = torch.autograd.grad(plain.mean(), theirs)
    assert float(expected.norm()) > 0
    assert float((own - expected).norm()) < 1e-4 * float(expected.norm())


@pytest.mark.parametrize("backbone", BOTH)
def test_equal_pictures_have_distance_zero_and_others_more(backbone: Backbone) -> None:
    a, b = pictures()
    network = lpips(backbone)
    assert network.distance(a, a).tolist() == [0, 0]
    near, far = network.distance(a, a + 0.02 * b), network.distance(a, b)
    assert bool((near > 0).all())
    assert bool((far > near).all())


@pytest.mark.parametrize("backbone", BOTH)
def test_smallest_picture(backbone: Backbone) -> None:
    network, side = lpips(backbone), SMALLEST[backbone]
    picture = torch.zeros(1, 3, side, side)
    assert float(network.distance(picture, picture)) == 0
    with pytest.raises(RuntimeError):
        network.distance(picture[..., 1:], picture[..., 1:])


def test_only_the_first_picture_has_a_gradient_and_nothing_is_trained_or_saved() -> None:
    a, b = (picture.requires_grad_() for picture in pictures())
    network = lpips(Backbone.vgg16)
    network(a, target_BCHW=b).sum().backward()
    assert a.grad is not None
    assert b.grad is None
    assert list(network.parameters()) == []
    assert network.state_dict() == {}


def test_autocast_changes_nothing() -> None:
    a, b = pictures()
    network = lpips(Backbone.vgg16)
    plain = network(a, target_BCHW=b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network(a.bfloat16().float(), target_BCHW=b)
        again = network(a, target_BCHW=b)
    assert mixed.dtype is torch.float32
    assert torch.equal(again, plain)


def test_files_may_have_either_naming(tmp_path: Path) -> None:
    tensors = random_lpips(Backbone.vgg16)
    heads = {name: tensor for name, tensor in tensors.items() if name.startswith("lin")}
    bones = {name: tensor for name, tensor in tensors.items() if name.startswith("features")}
    torch.save(heads, tmp_path / "heads.pth")
    torch.save(bones | {"classifier.0.weight": torch.ones(2, 2)}, tmp_path / "torchvision.pth")
    slices = {f"net.slice1.{name.removeprefix('features.')}": t for name, t in bones.items()}
    torch.save(slices | heads | {"scaling_layer.shift": torch.ones(1)}, tmp_path / "package.pth")
    a, b = pictures()
    expected = lpips(Backbone.vgg16).distance(a, b)
    for weights, other in (("torchvision.pth", tmp_path / "heads.pth"), ("package.pth", None)):
        found = read_lpips(
            Backbone.vgg16, weights=tmp_path / weights, heads=other, owner="stage.perceptual"
        )
        assert torch.equal(found.distance(a, b), expected)
    with pytest.raises(ConfigError, match=r"^stage\.perceptual: .*lin0\.model\.1\.weight is miss"):
        read_lpips(
            Backbone.vgg16,
            weights=tmp_path / "torchvision.pth",
            heads=None,
            owner="stage.perceptual",
        )
    with pytest.raises(ConfigError, match=r"features\.0\.weight has shape .* over alexnet"):
        read_lpips(Backbone.alexnet, weights=tmp_path / "package.pth", heads=None, owner="x")
