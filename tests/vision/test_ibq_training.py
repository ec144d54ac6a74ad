"""Objective, average of weights, and the start of the codebook."""

import copy

import pytest
import torch

from emu35.config import IBQConfig
from emu35.vision.ibq import calibrate as calibration
from emu35.vision.ibq.calibrate import MATCH_LOGIT, calibrate, pictures_needed
from emu35.vision.ibq.ema import AveragedIBQ
from emu35.vision.ibq.init import initialize
from emu35.vision.ibq.losses import IBQWeights, ibq_losses, quantization_loss
from emu35.vision.ibq.model import IBQ, Reconstruction, Through
from emu35.vision.ibq.nearest import nearest_codes
from emu35.vision.ibq.propagation import quantize_plain
from emu35.vision.ibq.quantizer import Quantized


def tiny_model(*, n_embed=64) -> IBQ:
    torch.manual_seed(0)
    return IBQ(
        IBQConfig(
            ch=32,
            ch_mult=[1, 1, 2],
            num_res_blocks=1,
            attn_resolutions=[],
            resolution=32,
            z_channels=16,
            embed_dim=8,
            n_embed=n_embed,
        )
    )


def quantized_grid(z_ND, codebook_KD) -> Quantized:
    found = quantize_plain(z_ND, codebook_KD=codebook_KD)
    as_grid = {
        "z_BDHW": z_ND.T[None, :, :, None],
        "z_q_BDHW": found.z_q_ND.T[None, :, :, None],
        "hard_BDHW": codebook_KD[found.codes_N].T[None, :, :, None],
    }
    return Quantized(**as_grid, codes_BHW=found.codes_N[None, :, None])


def test_quantization_loss_is_the_sum_of_its_three_terms():
    torch.manual_seed(0)
    z_ND = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    codebook_KD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    loss = quantization_loss(quantized_grid(z_ND, codebook_KD), commitment=0.25)
    soft_NK = (z_ND @ codebook_KD.T).softmax(1)
    hard_NK = torch.nn.functional.one_hot(soft_NK.argmax(1), 5).double()
    z_q_ND = (hard_NK + soft_NK - soft_NK.detach()) @ codebook_KD
    rows_ND = hard_NK @ codebook_KD
    written = (
        ((z_q_ND - z_ND) ** 2).mean()
        + ((rows_ND.detach() - z_ND) ** 2).mean()
        + 0.25 * ((rows_ND - z_ND.detach()) ** 2).mean()
    )
    torch.testing.assert_close(loss, written)
    ours = torch.autograd.grad(loss, (z_ND, codebook_KD), retain_graph=True)
    theirs = torch.autograd.grad(written, (z_ND, codebook_KD))
    torch.testing.assert_close(ours, theirs)


def test_commitment_moves_only_chosen_rows():
    torch.manual_seed(0)
    z_ND, codebook_KD = torch.randn(2, 3), torch.randn(20, 3, requires_grad=True)
    quantized = quantized_grid(z_ND, codebook_KD)
    with_term = quantization_loss(quantized, commitment=1.0)
    without = quantization_loss(quantized, commitment=0.0)
    (gradient_KD,) = torch.autograd.grad(with_term - without, codebook_KD)
    moved = set(gradient_KD.abs().sum(1).nonzero().flatten().tolist())
    assert moved == set(quantized.codes_BHW.flatten().tolist())


def test_weights_scale_their_terms():
    reconstruction = Reconstruction(
        pixels_B3HW=torch.full((1, 3, 2, 2), 0.5),
        quantized=quantized_grid(torch.randn(4, 3), torch.randn(5, 3)),
    )
    losses = ibq_losses(
        reconstruction,
        pixels_B3HW=torch.zeros(1, 3, 2, 2),
        weights=IBQWeights(reconstruction=3.0, mse=4.0, quantization=2.0),
    )
    assert losses.reconstruction.item() == pytest.approx(0.5)
    assert losses.mse.item() == pytest.approx(0.25)
    expected = 3.0 * 0.5 + 4.0 * 0.25 + 2.0 * losses.quantization.item()
    assert losses.total.item() == pytest.approx(expected)


def test_average_of_a_short_run_forgets_its_random_start():
    model = tiny_model()
    average = AveragedIBQ(model, decay=0.999)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(3.0)
    for _ in range(60):
        average.update(model)
    remaining = 1.0
    for n in range(60):
        remaining *= min(0.999, (1 + n) / (10 + n))
    assert remaining < 1e-6
    for weight in average.model.parameters():
        torch.testing.assert_close(weight, torch.full_like(weight, 3.0), atol=1e-4, rtol=0)
        assert not weight.requires_grad


def test_decay_bounds_the_average():
    model = tiny_model()
    average = AveragedIBQ(model, decay=0.5)
    average.updates = 1000
    before = average.model.quant_conv.weight.clone()
    with torch.no_grad():
        model.quant_conv.weight.add_(2.0)
    average.update(model)
    torch.testing.assert_close(average.model.quant_conv.weight, before + 1.0)


def latents_of(model, pixels_B3HW):
    return model.latents(pixels_B3HW).permute(0, 2, 3, 1).flatten(0, 2)


@torch.no_grad()
def test_calibration_keeps_the_network_and_centres_its_latents():
    model = tiny_model()
    pixels_B3HW = torch.rand(8, 3, 16, 16) * 2 - 1
    before = model(pixels_B3HW, through=Through.nothing).pixels_B3HW
    calibrate(
        [model],
        latents_ND=latents_of(model, pixels_B3HW),
        generator=torch.Generator().manual_seed(0),
    )
    after = model(pixels_B3HW, through=Through.nothing).pixels_B3HW
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    z_ND = latents_of(model, pixels_B3HW)
    assert z_ND.mean(0).abs().max() < 1e-4
    assert z_ND.square().sum(1).mean().item() == pytest.approx(MATCH_LOGIT, rel=1e-3)


@torch.no_grad()
def test_calibrated_codebook_is_used_and_fits_better_than_a_random_one():
    model = tiny_model()
    pixels_B3HW = torch.rand(16, 3, 16, 16) * 2 - 1
    calibrate(
        [model],
        latents_ND=latents_of(model, pixels_B3HW),
        generator=torch.Generator().manual_seed(0),
    )
    z_ND, codebook_KD = latents_of(model, pixels_B3HW), model.quantize.codebook_KD
    codes_N = nearest_codes(z_ND, codebook_KD=codebook_KD)
    assert len(codes_N.unique()) > 48
    random_KD = torch.randn(codebook_KD.shape, generator=torch.Generator().manual_seed(1))
    random_KD *= MATCH_LOGIT**0.5 / random_KD.norm(dim=1, keepdim=True)
    random_N = nearest_codes(z_ND, codebook_KD=random_KD)
    error = (z_ND - codebook_KD[codes_N]).square().mean()
    assert error < 0.7 * (z_ND - random_KD[random_N]).square().mean()


@torch.no_grad()
def test_calibration_moves_the_average_alike():
    model = tiny_model()
    average = copy.deepcopy(model)
    average.quant_conv.weight.mul_(1.1)
    pixels_B3HW = torch.rand(4, 3, 16, 16) * 2 - 1
    before = average(pixels_B3HW, through=Through.nothing).pixels_B3HW
    calibrate(
        [model, average],
        latents_ND=latents_of(model, pixels_B3HW),
        generator=torch.Generator().manual_seed(0),
    )
    after = average(pixels_B3HW, through=Through.nothing).pixels_B3HW
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert torch.equal(average.quantize.codebook_KD, model.quantize.codebook_KD)


@torch.no_grad()
def test_large_codebooks_start_from_a_sample(monkeypatch):
    monkeypatch.setattr(calibration, "SPREAD_LIMIT", 10)
    model = tiny_model(n_embed=200)
    latents_ND = torch.randn(50, 8)
    calibrate([model], latents_ND=latents_ND, generator=torch.Generator().manual_seed(0))
    lengths_K = model.quantize.codebook_KD.norm(dim=1)
    torch.testing.assert_close(lengths_K, torch.full_like(lengths_K, MATCH_LOGIT**0.5))


def test_fresh_network_passes_the_picture_through():
    """Residual branches start silent, and latents neither vanish nor explode."""
    model = tiny_model()
    initialize(model, seed=3)
    pixels_B3HW = torch.rand(2, 3, 16, 16) * 2 - 1
    x_BCHW = torch.randn(2, 32, 8, 8)
    assert torch.equal(model.encoder.mid.block_1(x_BCHW.repeat(1, 2, 1, 1))[:, :32], x_BCHW)
    with torch.no_grad():
        output = model(pixels_B3HW, through=Through.nothing).pixels_B3HW
    assert 0.05 < output.std() < 2.0


def test_initial_weights_depend_on_the_seed_alone():
    first, second, other = tiny_model(), tiny_model(), tiny_model()
    initialize(first, seed=1)
    torch.manual_seed(99)
    initialize(second, seed=1)
    initialize(other, seed=2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.quant_conv.weight, other.quant_conv.weight)


def test_enough_pictures_are_asked_for():
    assert pictures_needed(num_codes=512, codes_per_picture=36) * 36 >= 6 * 512
    assert pictures_needed(num_codes=131072, codes_per_picture=256) <= 1024
