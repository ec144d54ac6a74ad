"""The adversarial terms against their formulas, and who learns from what."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from emu35.config.tokenizer_objective import AdversarialConfig
from emu35.vision.ibq.objective.adversarial import (
    Adversary,
    LecamAnchors,
    hinge_loss,
    non_saturating_loss,
)
from emu35.vision.ibq.objective.discriminator import PatchDiscriminator, initialize_discriminator

logits = st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8).map(
    lambda values: torch.tensor(values).view(2, 1, 2, 2)
)


def small_adversary(**changes: object) -> Adversary:
    config = AdversarialConfig(weight=0.1, ndf=4, layers=2)
    for name, value in changes.items():
        setattr(config, name, value)
    return Adversary(config, seed=3)


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@given(real=logits, fake=logits)
def test_losses_are_their_formulas(real: torch.Tensor, fake: torch.Tensor) -> None:
    reals, fakes = real.flatten().tolist(), fake.flatten().tolist()
    hinge = sum(max(0.0, 1 - r) for r in reals) / 8 + sum(max(0.0, 1 + f) for f in fakes) / 8
    assert float(hinge_loss(real, fake_B1HW=fake)) == pytest.approx(hinge / 2, abs=1e-5)
    per_picture = torch.tensor([sum(fakes[:4]) / 4, sum(fakes[4:]) / 4], dtype=torch.float64)
    generator = torch.log1p(torch.exp(-per_picture)).mean()
    assert float(non_saturating_loss(fake)) == pytest.approx(float(generator), abs=1e-5)

    anchors = LecamAnchors(decay=0.5)
    anchors.update(real=torch.tensor(1.0), fake=torch.tensor(-0.6))  # to 0.5 and -0.3
    lecam = sum(max(0.0, r + 0.3) ** 2 for r in reals) / 8
    lecam += sum(max(0.0, 0.5 - f) ** 2 for f in fakes) / 8
    assert float(anchors.penalty(real, fake_B1HW=fake)) == pytest.approx(lecam, abs=1e-4)


def test_anchors_are_exponential_averages() -> None:
    anchors = LecamAnchors(decay=0.9)
    reals, fakes = torch.randn(20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    for real, fake in zip(reals, fakes, strict=True):
        anchors.update(real=real, fake=fake)
    shares = 0.1 * 0.9 ** torch.arange(19, -1, -1, dtype=torch.float64)
    assert float(anchors.real) == pytest.approx(float(shares @ reals), abs=1e-6)
    assert float(anchors.fake) == pytest.approx(float(shares @ fakes), abs=1e-6)


def test_total_weighs_lecam() -> None:
    adversary = small_adversary(lecam_weight=0.3)
    adversary.anchors.update(real=torch.tensor(5.0), fake=torch.tensor(-5.0))
    losses = adversary.discriminator_losses(pixels_B3HW=pictures(0), reconstructed_B3HW=pictures(1))
    assert float(losses.lecam.detach()) > 0
    torch.testing.assert_close(losses.total, losses.hinge + 0.3 * losses.lecam)


def test_neither_gradient_reaches_the_other() -> None:
    adversary = small_adversary()
    reconstructed = pictures(1).requires_grad_()
    losses = adversary.discriminator_losses(
        pixels_B3HW=pictures(0), reconstructed_B3HW=reconstructed
    )
    losses.total.backward()
    assert reconstructed.grad is None
    learnt = {n: w.grad.clone() for n, w in adversary.named_parameters() if w.grad is not None}
    assert set(learnt) == {n for n, _ in adversary.named_parameters()}
    assert all(bool(gradient.any()) for n, gradient in learnt.items() if not n.endswith("0.bias"))

    adversary.generator_loss(reconstructed).backward()
    assert reconstructed.grad is not None
    assert bool(reconstructed.grad.any())
    for name, weight in adversary.named_parameters():
        assert weight.grad is not None
        assert torch.equal(weight.grad, learnt[name]), f"{name} learnt from the generator's loss"
        assert weight.requires_grad


def test_generator_loss_is_that_of_the_discriminator_itself() -> None:
    adversary, reconstructed = small_adversary(), pictures(1).requires_grad_()
    twin = copy.deepcopy(adversary.discriminator)
    (ours,) = torch.autograd.grad(adversary.generator_loss(reconstructed), reconstructed)
    loss = functional.softplus(-twin(reconstructed).mean(dim=(1, 2, 3))).mean()
    (theirs,) = torch.autograd.grad(loss, reconstructed)
    torch.testing.assert_close(ours, theirs)


def test_the_game_teaches_both_sides() -> None:
    """A discriminator tells noise from stripes, and what it says makes noise look striped."""
    adversary = small_adversary()
    stripes = (torch.arange(16) // 2 % 2 * 2.0 - 1).expand(4, 3, 16, 16)
    noise = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    optimizer = torch.optim.Adam(adversary.parameters(), lr=2e-3, betas=(0.5, 0.9))
    for _ in range(40):
        losses = adversary.discriminator_losses(pixels_B3HW=stripes, reconstructed_B3HW=noise)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        adversary.anchors.update(real=losses.real, fake=losses.fake)
    assert float(losses.real) > float(losses.fake) + 1  # type: ignore[possibly-undefined]
    painted = noise.clone().requires_grad_()
    before = adversary.generator_loss(painted)
    (slope,) = torch.autograd.grad(before, painted)
    after = adversary.generator_loss(painted.detach() - 0.1 * slope.sign())
    assert float(after) < float(before.detach())


@pytest.mark.parametrize(
    ("config", "weights", "learns"),
    [
        (AdversarialConfig(weight=0.0), [0, 0, 0, 0], [False] * 4),
        (AdversarialConfig(weight=0.2), [0.2] * 4, [True] * 4),
        (AdversarialConfig(weight=0.2, start_step=3), [0, 0, 0.2, 0.2], [False, False, True, True]),
        (
            AdversarialConfig(weight=0.2, start_step=3, discriminator_start=2, warmup_steps=2),
            [0, 0, 0.1, 0.2],
            [False, True, True, True],
        ),
    ],
)
def test_schedule(config: AdversarialConfig, weights: list[float], learns: list[bool]) -> None:
    config.ndf = 2
    adversary = Adversary(config, seed=0)
    assert [adversary.generator_weight(step) for step in (1, 2, 3, 4)] == pytest.approx(weights)
    assert [adversary.discriminator_learns(step) for step in (1, 2, 3, 4)] == learns


def test_discriminator_is_pix2pix_of_three_layers() -> None:
    discriminator = PatchDiscriminator()
    widths = [(3, 64, 2), (64, 128, 2), (128, 256, 2), (256, 512, 1), (512, 1, 1)]
    convolutions = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    found = [(c.in_channels, c.out_channels, c.stride[0]) for c in convolutions]
    assert found == widths
    assert [c.bias is None for c in convolutions] == [False, True, True, True, False]
    # pix2pix's own has 2.769 M, for pictures and their conditions: six channels, 3 x 64 x 16 more.
    assert sum(weight.numel() for weight in discriminator.parameters()) + 3072 == 2_768_705
    pixels = torch.zeros(1, 3, 94, 94)
    pixels.requires_grad_()
    discriminator.eval()  # batch statistics would let every pixel reach every logit
    logits_B1HW = discriminator(pixels)
    assert logits_B1HW.shape == (1, 1, 9, 9)
    (reach,) = torch.autograd.grad(logits_B1HW[0, 0, 4, 4], pixels)
    rows = reach[0].abs().sum(dim=(0, 1)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


@settings(max_examples=10, deadline=None)
@given(layers=st.integers(1, 4))
def test_smallest_picture(layers: int) -> None:
    smallest = AdversarialConfig(layers=layers).smallest
    discriminator = PatchDiscriminator(ndf=1, layers=layers).eval()
    assert discriminator(torch.zeros(1, 3, smallest, smallest)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(1, 3, smallest - 1, smallest - 1))


def test_first_weights_come_from_the_seed_alone() -> None:
    one, other = PatchDiscriminator(ndf=16), PatchDiscriminator(ndf=16)
    for discriminator in (one, other):
        initialize_discriminator(discriminator, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    weight = one.get_parameter("main.2.weight")
    assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
    scale = one.get_parameter("main.3.weight")
    assert float(scale.mean()) == pytest.approx(1, abs=0.02)


def test_state_dict_is_all_there_is() -> None:
    trained, fresh = small_adversary(), Adversary(small_adversary().config, seed=9)
    trained.discriminator_losses(pixels_B3HW=pictures(0), reconstructed_B3HW=pictures(1))
    trained.anchors.update(real=torch.tensor(0.7), fake=torch.tensor(-0.2))
    fresh.load_state_dict(trained.state_dict())
    both = [
        adversary.discriminator_losses(pixels_B3HW=pictures(2), reconstructed_B3HW=pictures(3))
        for adversary in (trained, fresh)
    ]
    assert torch.equal(both[0].total, both[1].total)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name
