"""Scores: proxies see what they are named for, classifiers run from files as declared."""

import numpy as np
import pytest
import torch
from drawn_pictures import blurred, marked, texture
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from emu35.config.images import PROXY_SCORERS, Activation, ClassifierScorerConfig, Fit
from emu35.errors import ConfigError
from emu35.vision.pictures.readers import number_in
from emu35.vision.pictures.scorers.classifier import Classifier
from emu35.vision.pictures.scorers.proxies import make_proxy

PICTURES = [np.asarray(texture(number)) for number in range(6)]


def scores(name: str, pictures) -> np.ndarray:
    return make_proxy(name, side=96).score(pictures)


def test_blurred_pictures_are_less_sharp():
    soft = [np.asarray(blurred(Image.fromarray(picture))) for picture in PICTURES]
    assert (scores("sharpness_proxy", soft) < scores("sharpness_proxy", PICTURES) / 10).all()


def test_sharpness_is_the_variance_of_the_laplacian():
    scipy = pytest.importorskip("scipy.ndimage")
    light = PICTURES[0].astype(np.float64) @ (0.299, 0.587, 0.114)
    wanted = scipy.laplace(light)[1:-1, 1:-1].var()
    assert scores("sharpness_proxy", PICTURES[:1])[0] == pytest.approx(wanted)


def test_greys_have_no_colour_and_faded_pictures_less():
    grey = [np.asarray(Image.fromarray(p).convert("L").convert("RGB")) for p in PICTURES]
    faded = [(0.5 * a + 0.5 * b).astype(np.uint8) for a, b in zip(PICTURES, grey, strict=True)]
    assert scores("colourfulness_proxy", grey) == pytest.approx(0)
    half = scores("colourfulness_proxy", faded) / scores("colourfulness_proxy", PICTURES)
    assert half == pytest.approx(0.5, abs=0.06)


def test_contrast_is_the_spread_of_brightness():
    board = (np.indices((8, 8)).sum(axis=0) % 2 * 255).astype(np.uint8)
    picture = np.repeat(board[:, :, None], 3, axis=2)
    assert scores("contrast_proxy", [picture, picture // 5])[0] == pytest.approx(127.5)
    assert scores("contrast_proxy", [picture // 5])[0] == pytest.approx(25.5)


def test_writing_is_seen_and_noise_and_edges_are_not():
    written = [np.asarray(marked(Image.fromarray(picture))) for picture in PICTURES]
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)
    edge = np.zeros((96, 96, 3), dtype=np.uint8)
    edge[:, 41:] = 255
    assert (scores("overlay_proxy", written) > 0.1).all()
    assert (scores("overlay_proxy", [*PICTURES, noise, edge]) < 0.02).all()


@given(
    picture=arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)))
)
def test_any_picture_has_finite_scores(picture):
    for name in PROXY_SCORERS:
        (score,) = scores(name, [picture])
        assert np.isfinite(score)
        assert score >= 0


@pytest.mark.parametrize(
    ("metadata", "field", "number"),
    [
        ({"a": 1}, "a", 1.0),
        ({"a": {"b": "2.5"}}, "a.b", 2.5),
        ({"a": True}, "a", 1.0),
        ({"a": None}, "a", None),
        ({"a": [1]}, "a", None),
        ({"a": "high"}, "a", None),
        ({"a": float("inf")}, "a", None),
        ({"a": 1}, "a.b", None),
        ({}, "a", None),
    ],
)
def test_numbers_are_found_in_metadata(metadata, field, number):
    found = number_in(metadata, field)
    assert found == number if number is not None else np.isnan(found)


class Means(torch.nn.Module):
    """The mean of each channel: three classes."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(dim=(2, 3))


class Largest(torch.nn.Module):
    """The largest value of each channel."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.amax(dim=(2, 3))


@pytest.fixture(scope="module")
def means(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "means.pt"
    torch.jit.script(Means()).save(str(path))
    return path


def classifier(path, **options) -> Classifier:
    config = ClassifierScorerConfig(
        path=str(path), side=8, **{"mean": [0.0] * 3, "std": [1.0] * 3, **options}
    )
    return Classifier("quality", config=config)


def colours(*rgb):
    return [np.full((10, 14, 3), colour, dtype=np.uint8) for colour in rgb]


def test_torchscript_models_run_as_declared(means):
    shown = colours((255, 0, 51), (0, 102, 0))
    assert classifier(means, output=2).score(shown) == pytest.approx([0.2, 0], abs=1e-6)
    normalised = classifier(means, output=1, mean=[0, 0.2, 0], std=[1, 0.5, 1])
    assert normalised.score(shown) == pytest.approx([-0.4, 0.4], abs=1e-6)
    turned = classifier(means, output=2, channels="bgr")
    assert turned.score(shown) == pytest.approx([1, 0], abs=1e-6)
    softmax = classifier(means, activation=Activation.softmax)
    wanted = torch.softmax(torch.tensor([1.0, 0.0, 0.2]), 0)[0].item()
    assert softmax.score(shown)[0] == pytest.approx(wanted, abs=1e-6)
    sigmoid = classifier(means, activation=Activation.sigmoid)
    assert sigmoid.score(shown) == pytest.approx([1 / (1 + np.exp(-1)), 0.5], abs=1e-6)
    assert classifier(means).score([]).shape == (0,)


def test_a_picture_is_squashed_or_its_centre_taken(means):
    picture = np.zeros((8, 24, 3), dtype=np.uint8)
    picture[:, 8:16] = 255
    assert classifier(means, fit=Fit.centre).score([picture])[0] == pytest.approx(1, abs=0.02)
    assert classifier(means).score([picture])[0] == pytest.approx(1 / 3, abs=0.05)


def test_onnx_models_run_as_declared(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra 'rewards'")
    from onnx_models import node, write_model

    path = write_model(
        tmp_path / "means.onnx",
        nodes=[node("GlobalAveragePool", ["data"], "means")],
        inputs={"data": (1, 3, 8, 8)},  # one at a time
        outputs={"means": (1, 3, 1, 1)},
    )
    found = classifier(path, output=2).score(colours((255, 0, 51), (0, 0, 102)))
    assert found == pytest.approx([0.2, 0.4], abs=1e-6)


def test_identities_are_those_of_what_decides(means, tmp_path):
    copy = tmp_path / "copy.pt"
    copy.write_bytes(means.read_bytes())
    assert classifier(means).identity == classifier(copy).identity
    assert classifier(means).identity != classifier(means, output=1).identity
    torch.jit.script(Largest()).save(str(copy))
    assert classifier(means).identity != classifier(copy).identity
    one, other = (make_proxy("sharpness_proxy", side=side) for side in (64, 96))
    assert one.identity != other.identity


def test_models_that_cannot_be_used_are_named(means, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.scorers\.quality: there is no file .*gone\.pt"):
        classifier(tmp_path / "gone.pt")
    for name in ("junk.pt", "junk.onnx"):
        (tmp_path / name).write_bytes(b"junk")
        with pytest.raises(ConfigError, match=name + " cannot be opened"):
            classifier(tmp_path / name)
    with pytest.raises(ConfigError, match="has 3 outputs"):
        classifier(means, output=3).score(colours((0, 0, 0)))
