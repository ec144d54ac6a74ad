"""What the terms of the tokenizer's objective may not say, and how it is told."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu35.config import IBQConfig
from emu35.config.tokenizer_objective import (
    AdversarialConfig,
    DistillationConfig,
    EntropyConfig,
    PerceptualConfig,
    PerceptualKind,
    TeacherKind,
)

SECTIONS = {
    "perceptual": PerceptualConfig,
    "adversarial": AdversarialConfig,
    "distillation": DistillationConfig,
    "entropy": EntropyConfig,
}
RANDOM = PerceptualKind.random_features


@pytest.mark.parametrize("name", SECTIONS)
def test_every_term_is_off_unless_it_is_asked_for(name: str) -> None:
    config = SECTIONS[name]()
    assert config.weight == 0
    assert list(config.problems()) == []


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (PerceptualConfig(weight=-1.0), "stage.perceptual.weight=-1.0 is too small"),
        (PerceptualConfig(weight=float("nan")), "stage.perceptual.weight=nan is too small"),
        (PerceptualConfig(weight=1.0), "stage.perceptual.weights is empty, but"),
        (PerceptualConfig(heads="a"), "stage.perceptual.heads=a needs stage.perceptual.weights"),
        (
            PerceptualConfig(weight=1.0, kind=RANDOM, weights="vgg.pth"),
            "stage.perceptual.weights=vgg.pth is not read with",
        ),
        (
            AdversarialConfig(start_step=3, discriminator_start=4),
            "stage.adversarial.discriminator_start=4 comes after stage.adversarial.start_step=3",
        ),
        (AdversarialConfig(discriminator_start=-1), "discriminator_start=-1 is too small"),
        (AdversarialConfig(layers=0), "stage.adversarial.layers=0 is too small; use at least 1"),
        (AdversarialConfig(lecam_decay=1.0), "stage.adversarial.lecam_decay=1.0 must lie in"),
        (AdversarialConfig(lecam_weight=-0.1), "stage.adversarial.lecam_weight=-0.1 is too small"),
        (DistillationConfig(weight=0.5), "stage.distillation.teacher is empty, but"),
        (DistillationConfig(layer=-1), "stage.distillation.layer=-1 is too small"),
        (DistillationConfig(hidden=0), "stage.distillation.hidden=0 is too small"),
        (
            DistillationConfig(kind=TeacherKind.random_features, teacher="siglip"),
            "stage.distillation.teacher=siglip is not read with",
        ),
        (
            EntropyConfig(temperature=0.0),
            "stage.entropy.temperature=0.0 must be finite and at least 1e-6",
        ),
        (
            EntropyConfig(weight=0.1, sample_weight=0.0, codebook_weight=0.0),
            "leave nothing of the term",
        ),
    ],
)
def test_what_makes_no_sense_is_named(config: Any, problem: str) -> None:
    problems = list(config.problems())
    assert len(problems) == 1
    assert problem in problems[0]


numbers = st.floats(-2, 2)


@given(weight=numbers, sample=numbers, codebook=numbers, temperature=numbers)
def test_entropy_is_refused_exactly_where_it_is_undefined(
    weight: float, sample: float, codebook: float, temperature: float
) -> None:
    config = EntropyConfig(
        weight=weight, sample_weight=sample, codebook_weight=codebook, temperature=temperature
    )
    sound = min(weight, sample, codebook) >= 0 and temperature >= 1e-6
    sound = sound and (weight == 0 or max(sample, codebook) > 0)
    assert (not list(config.problems())) == sound


@given(start=st.integers(-2, 5), discriminator=st.none() | st.integers(-2, 5))
def test_the_discriminator_never_starts_after_the_tokenizer_feels_it(
    start: int, discriminator: int | None
) -> None:
    config = AdversarialConfig(start_step=start, discriminator_start=discriminator)
    if not list(config.problems()):
        assert 0 <= config.discriminator_step <= config.start_step


@given(levels=st.integers(1, 6), layer=st.integers(0, 8), weight=st.sampled_from([0.0, 0.5]))
def test_layer_must_be_one_of_the_decoder(levels: int, layer: int, weight: float) -> None:
    config = DistillationConfig(weight=weight, layer=layer)
    problems = list(config.problems_with(IBQConfig(ch_mult=[1] * levels)))
    assert bool(problems) == (weight > 0 and layer > levels)
    if problems:
        assert f"use 0 to {levels}" in problems[0]


@pytest.mark.parametrize(("side", "fits"), [(23, False), (24, True)])
def test_pictures_must_fill_a_patch(side: int, fits: bool) -> None:
    assert (not list(AdversarialConfig(weight=0.1).problems_with(side=side))) == fits
    assert list(AdversarialConfig(weight=0.0).problems_with(side=side)) == []


def test_lpips_needs_pictures_of_sixteen_pixels() -> None:
    lpips = PerceptualConfig(weight=1.0, weights="vgg.safetensors")
    assert list(lpips.problems_with(side=16)) == []
    assert "but the tokenizer trains on 15" in next(lpips.problems_with(side=15))
    assert list(PerceptualConfig(weight=1.0, kind=RANDOM).problems_with(side=4)) == []
