"""The feature space without a network: what it sees and what it does not."""

import numpy as np
import torch
from PIL import Image, ImageFilter

from emu35.vision.frechet import fit_gaussian, frechet_distance
from emu35.vision.wavelets import DIMENSIONS, wavelet_features


def textured(count: int, *, blur: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Random pictures uint8 [N, 3, 32, 32], blurred by so many pixels."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, size=(count, 32, 32, 3)).astype(np.uint8)
    smoothed = [
        np.asarray(Image.fromarray(each).filter(ImageFilter.GaussianBlur(0.7 + blur)))
        for each in pictures
    ]
    return torch.from_numpy(np.stack(smoothed)).permute(0, 3, 1, 2)


def test_the_more_blur_the_farther() -> None:
    original = fit_gaussian(wavelet_features(textured(100)).numpy())
    distances = [
        frechet_distance(original, fit_gaussian(wavelet_features(textured(100, blur=blur)).numpy()))
        for blur in (0.0, 0.2, 0.5)
    ]
    again = fit_gaussian(wavelet_features(textured(100, seed=1)).numpy())
    assert distances[0] < 1e-6
    assert frechet_distance(original, again) < distances[1] < distances[2]


def test_flat_pictures_have_finite_features() -> None:
    flat = torch.zeros((2, 3, 33, 50), dtype=torch.uint8)
    found = wavelet_features(flat)
    assert found.shape == (2, DIMENSIONS)
    assert bool(found.isfinite().all())
