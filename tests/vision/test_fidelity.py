"""PSNR and SSIM against values computed by hand and against scikit-image."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu35.vision.fidelity import PSNR_CAP, from_levels, is_capped, psnr, ssim, to_levels


def noisy(seed: int, *, side: tuple[int, int], strength: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth picture and one with noise on it, uint8 [1, 3, H, W]."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, size=(3, 4, 4)).astype(np.float64)
    grown = np.kron(base, np.ones((1, 16, 16)))[:, : side[0], : side[1]]
    noise = rng.integers(-strength, strength + 1, size=grown.shape)
    pictures = (np.clip(each, 0, 255).astype(np.uint8) for each in (grown, grown + noise))
    a, b = (torch.from_numpy(each)[None] for each in pictures)
    return a, b


def test_known_errors_have_their_decibels() -> None:
    grey = torch.full((3, 3, 16, 16), 100, dtype=torch.uint8)
    other = grey.clone()
    other[0] += 1
    other[1, :, 0, 0] += 16  # a mean squared error of 1 as well
    found = psnr(other, target_B3HW=grey).tolist()
    assert found[:2] == pytest.approx([48.1308, 48.1308], abs=1e-4)
    assert found[2] == pytest.approx(PSNR_CAP)
    assert [is_capped(value) for value in found] == [False, False, True]


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    height=st.integers(11, 48),
    width=st.integers(11, 48),
    strength=st.integers(1, 90),
)
def test_both_are_those_of_scikit_image(seed: int, height: int, width: int, strength: int) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    a, b = noisy(seed, side=(height, width), strength=strength)
    images = [each[0].permute(1, 2, 0).numpy() for each in (a, b)]
    wanted = metrics.structural_similarity(
        *images,
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert float(ssim(b, target_B3HW=a)) == pytest.approx(wanted, abs=1e-9)
    decibels = metrics.peak_signal_noise_ratio(*images, data_range=255)
    assert float(psnr(b, target_B3HW=a)) == pytest.approx(decibels, abs=1e-9)


def test_equal_and_flat_pictures_are_alike() -> None:
    picture, _ = noisy(0, side=(32, 32), strength=1)
    flat = torch.full((1, 3, 32, 32), 7, dtype=torch.uint8)
    pair = torch.cat([picture, flat])
    assert ssim(pair, target_B3HW=pair).tolist() == pytest.approx([1.0, 1.0])


def test_pictures_below_a_window_are_refused() -> None:
    small = torch.zeros((1, 3, 10, 40), dtype=torch.uint8)
    with pytest.raises(ValueError, match="10 x 40 pixels; SSIM needs 11"):
        ssim(small, target_B3HW=small)


def test_levels_come_back_and_what_lies_outside_is_clamped() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_levels(from_levels(levels)), levels)
    assert to_levels(torch.tensor([-3.0, 2.0])).tolist() == [0, 255]
