"""Distillation against its formula, who learns, and features as the decoder makes them."""

import pytest
import torch
from torch import nn

from emu35.config import IBQConfig
from emu35.config.tokenizer_objective import DistillationConfig, TeacherKind
from emu35.vision.ibq.blocks import decoder_channels
from emu35.vision.ibq.model import IBQ
from emu35.vision.ibq.objective.distillation import Distillation, build_distillation
from emu35.vision.ibq.objective.teacher import RandomTeacher

CPU = torch.device("cpu")
TINY = IBQConfig(
    ch=32,
    ch_mult=[1, 1, 2],
    num_res_blocks=1,
    attn_resolutions=[],
    resolution=32,
    z_channels=16,
    embed_dim=8,
    n_embed=64,
)


class Shrunk(nn.Module):
    """A teacher with a parameter of its own: pictures of 4 x 4 pixels through a convolution."""

    channels = 5

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 5, 1)

    def forward(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        return self.mix(nn.functional.adaptive_avg_pool2d(pixels_B3HW, 4)).detach()


def distillation(*, channels: int = 6) -> Distillation:
    torch.manual_seed(0)
    return Distillation(teacher=Shrunk(), layer=1, channels=channels, hidden=7, seed=3)


def pictures(size: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_it_is_the_mean_negative_cosine_of_every_place() -> None:
    term = distillation()
    features = torch.randn(2, 6, 8, 12, generator=torch.Generator().manual_seed(2))
    teacher = term._teacher[0]
    assert isinstance(teacher, Shrunk)
    target = teacher(pictures())
    first, _, second, _, third = term.projector
    cosines: list[torch.Tensor] = []
    for picture in range(2):
        for row in range(4):
            for column in range(4):
                cell = features[picture, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
                hidden = nn.functional.silu(first(cell.mean(dim=(1, 2))))
                predicted = third(nn.functional.silu(second(hidden)))
                wanted = target[picture, :, row, column]
                cosines.append(predicted @ wanted / (predicted.norm() * wanted.norm()))
    expected = -torch.stack(cosines).mean()
    torch.testing.assert_close(term(features, pixels_B3HW=pictures()), expected)


def test_features_and_projector_learn_and_the_teacher_does_not() -> None:
    term = distillation()
    features = torch.randn(2, 6, 8, 8).requires_grad_()
    pixels = pictures().requires_grad_()
    term(features, pixels_B3HW=pixels).backward()
    assert features.grad is not None
    assert bool(features.grad.any())
    assert pixels.grad is None
    teacher = term._teacher[0]
    assert isinstance(teacher, Shrunk)
    assert all(weight.grad is None for weight in teacher.parameters())
    names = {name.split(".")[0] for name in term.state_dict()}
    assert names == {name.split(".")[0] for name, _ in term.named_parameters()} == {"projector"}
    assert all(weight.grad is not None for weight in term.parameters())


def test_the_projector_comes_from_the_seed_and_from_its_state() -> None:
    one, two = distillation(), distillation()
    torch.manual_seed(5)
    other = Distillation(teacher=Shrunk(), layer=1, channels=6, hidden=7, seed=4)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    other.load_state_dict(one.state_dict())
    assert torch.equal(next(one.parameters()), next(other.parameters()))


def test_mixed_precision_features_are_welcome() -> None:
    term = distillation()
    loss = term(torch.randn(2, 6, 8, 8).bfloat16(), pixels_B3HW=pictures())
    assert loss.dtype is torch.float32
    assert -1 <= float(loss.detach()) <= 1


def test_decoder_features_are_those_of_its_stages() -> None:
    torch.manual_seed(0)
    model = IBQ(TINY)
    seen: list[torch.Tensor] = []
    model.decoder.mid.register_forward_hook(lambda *_: seen.append(_[-1]))
    for level in reversed(model.decoder.up):
        upsample = level.get_submodule("upsample") if level is not model.decoder.up[0] else level
        upsample.register_forward_hook(lambda *_: seen.append(_[-1]))
    found = model(pictures(), keep=(0, 1, 2, 3))
    assert [tuple(found.features[stage].shape) for stage in range(4)] == [
        (2, 64, 8, 8),
        (2, 64, 16, 16),
        (2, 32, 32, 32),
        (2, 32, 32, 32),
    ]
    assert [found.features[stage].shape[1] for stage in range(4)] == decoder_channels(TINY)
    for stage in range(4):
        assert torch.equal(found.features[stage], seen[stage])
    plain = model(pictures())
    assert plain.features == {}
    assert torch.equal(plain.pixels_B3HW, found.pixels_B3HW)


def test_the_full_decoder_has_the_paper_teachers_channels() -> None:
    """At 256 pixels: 1024 on 16 x 16, 1024 on 32 x 32, 512 on 64 x 64 ..."""
    assert decoder_channels(IBQConfig()) == [1024, 1024, 512, 512, 256, 256]


@pytest.mark.parametrize("layer", range(4))
def test_the_tokenizer_learns_from_the_teacher(layer: int) -> None:
    config = DistillationConfig(
        weight=0.5, kind=TeacherKind.random_features, layer=layer, hidden=16
    )
    term = build_distillation(config, model=TINY, seed=0, device=CPU)
    assert term is not None
    torch.manual_seed(0)
    model = IBQ(TINY)
    weights = [*model.parameters(), *term.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-3)
    losses: list[float] = []
    for _ in range(5):
        output = model(pictures(), keep=(term.layer,))
        loss = term(output.features[term.layer], pixels_B3HW=pictures())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    codebook = model.quantize.codebook_KD.grad
    assert codebook is not None
    assert bool(codebook.any())


def test_nothing_is_built_at_weight_zero() -> None:
    config = DistillationConfig(teacher="/nowhere")
    assert build_distillation(config, model=TINY, seed=0, device=CPU) is None


def test_random_teacher_spans_the_picture_and_depends_on_its_seed() -> None:
    teacher = RandomTeacher(seed=0, device=CPU)
    features = teacher(torch.rand(1, 3, 32, 48, requires_grad=True))
    assert features.shape == (1, teacher.channels, 4, 6)
    assert not features.requires_grad
    assert torch.equal(teacher(pictures()), RandomTeacher(seed=0, device=CPU)(pictures()))
    assert not torch.equal(teacher(pictures()), RandomTeacher(seed=1, device=CPU)(pictures()))
