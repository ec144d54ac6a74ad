"""Terms of the image tokenizer's objective beyond pixels and quantization (paper section 5.2).

Every term has a ``weight`` in the generator's loss. At 0 the term is off: nothing is read from
disk for it and nothing is computed. Steps count from 1, as everywhere in training.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from emu35.config.check import at_least, seeds
from emu35.config.model import IBQConfig

VGG_SIDE = 16
"""Pixels a side of the smallest picture that VGG16's five blocks take."""


class PerceptualKind(StrEnum):
    """``lpips``: the learnt distance over VGG16, from weights on disk. ``random_features``: a
    distance over an untrained network drawn from a seed, which needs no file and is not LPIPS."""

    lpips = "lpips"
    random_features = "random_features"


@dataclass(kw_only=True, slots=True)
class PerceptualConfig:
    """Distance of deep features between pictures and reconstructions. The paper's: LPIPS, weight 1.

    ``weights`` is a file (safetensors or .pth) of VGG16 in torchvision's names or those of the
    lpips package; ``heads`` is a file of LPIPS's linear layers, or null where ``weights`` has them
    too, as the file of ``scripts/fetch_lpips.py`` does. ``seed`` is for ``random_features`` alone.
    """

    weight: float = 0.0
    kind: PerceptualKind = PerceptualKind.lpips
    weights: str | None = None
    heads: str | None = None
    seed: int = 0

    def problems(self) -> Iterator[str]:
        where = "stage.perceptual"
        yield from at_least(where, 0, weight=self.weight)
        yield from seeds(where, seed=self.seed)
        reads = self.kind is PerceptualKind.lpips
        if self.weight > 0 and reads and not self.weights:
            yield (
                f"{where}.weights is empty, but {where}.weight={self.weight} asks for LPIPS; fetch "
                f"them with scripts/fetch_lpips.py and name the file, use {where}.weight=0, or "
                f"{where}.kind=random_features, which is not LPIPS"
            )
        if not reads and (self.weights or self.heads):
            named = "weights" if self.weights else "heads"
            yield (
                f"{where}.{named}={self.weights or self.heads} is not read with "
                f"{where}.kind={self.kind}; set it to null"
            )
        elif self.heads and not self.weights:
            yield f"{where}.heads={self.heads} needs {where}.weights, the file of VGG16"

    def problems_with(self, *, side: int) -> Iterator[str]:
        """What does not fit pictures of ``side`` pixels on their shorter side."""
        if self.weight > 0 and self.kind is PerceptualKind.lpips and side < VGG_SIDE:
            yield (
                f"stage.perceptual.kind={self.kind} halves pictures four times and so needs "
                f"{VGG_SIDE} pixels a side, but the tokenizer trains on {side}; train on larger "
                f"ones, or use stage.perceptual.weight=0"
            )


@dataclass(kw_only=True, slots=True)
class AdversarialConfig:
    """A PatchGAN discriminator against the tokenizer. The usual weight is 0.1.

    The discriminator learns from step ``discriminator_start`` on (null: from ``start_step``); the
    tokenizer feels it from ``start_step`` on, at a weight that grows linearly over ``warmup_steps``
    (0: at once). ``layers`` is the number of strided convolutions, ``ndf`` the width of the first;
    each output logit of 3 layers sees 70 x 70 pixels. ``lecam_weight`` weighs LeCAM's
    regularisation, whose anchors follow the mean logits with ``lecam_decay``. ``lr`` is the
    discriminator's own learning rate (null: ``optim.lr``), on the schedule of ``optim``.
    """

    weight: float = 0.0
    start_step: int = 0
    discriminator_start: int | None = None
    warmup_steps: int = 0
    layers: int = 3
    ndf: int = 64
    lecam_weight: float = 0.05
    lecam_decay: float = 0.999
    lr: float | None = None

    @property
    def discriminator_step(self) -> int:
        """The first step that trains the discriminator."""
        return self.start_step if self.discriminator_start is None else self.discriminator_start

    @property
    def smallest(self) -> int:
        """Pixels a side of which the discriminator makes one logit."""
        return 3 * 2**self.layers

    def problems(self) -> Iterator[str]:
        where = "stage.adversarial"
        yield from at_least(
            where,
            0,
            weight=self.weight,
            start_step=self.start_step,
            warmup_steps=self.warmup_steps,
            lecam_weight=self.lecam_weight,
        )
        yield from at_least(where, 1, layers=self.layers, ndf=self.ndf)
        if self.lr is not None:
            yield from at_least(where, 0, lr=self.lr)
        if self.discriminator_start is not None:
            yield from at_least(where, 0, discriminator_start=self.discriminator_start)
            if self.discriminator_start > self.start_step:
                yield (
                    f"{where}.discriminator_start={self.discriminator_start} comes after "
                    f"{where}.start_step={self.start_step}: the tokenizer would learn from an "
                    "untrained discriminator; make it no larger, or null"
                )
        if not 0 <= self.lecam_decay < 1:
            yield f"{where}.lecam_decay={self.lecam_decay} must lie in [0, 1)"

    def problems_with(self, *, side: int) -> Iterator[str]:
        """What does not fit pictures of ``side`` pixels on their shorter side."""
        if self.weight > 0 and side < self.smallest:
            yield (
                f"stage.adversarial.layers={self.layers} needs pictures of {self.smallest} pixels "
                f"a side, but the tokenizer trains on {side}; use fewer layers or larger pictures"
            )


class TeacherKind(StrEnum):
    """``vision_tower``: SigLIP, or another vision transformer, from a folder. ``random_features``:
    an untrained network drawn from a seed, which needs no file and knows no semantics."""

    vision_tower = "vision_tower"
    random_features = "random_features"


@dataclass(kw_only=True, slots=True)
class DistillationConfig:
    """Decoder features learn to predict a frozen teacher's (paper section 2.3, after REPA, arXiv
    2410.06940). The paper's teacher is siglip-large-patch16-256; layer and weight are unpublished.

    ``teacher`` is the folder of a transformers checkpoint; nothing is fetched. ``layer`` counts the
    decoder's stages as they run: 0 are the middle blocks, 1 the level of the lowest resolution with
    its upsampling, and so on. ``hidden`` is the width of the projector between the two. ``seed`` is
    for ``random_features`` alone.
    """

    weight: float = 0.0
    kind: TeacherKind = TeacherKind.vision_tower
    teacher: str | None = None
    layer: int = 1
    hidden: int = 2048
    seed: int = 0

    def problems(self) -> Iterator[str]:
        where = "stage.distillation"
        yield from at_least(where, 0, weight=self.weight, layer=self.layer)
        yield from seeds(where, seed=self.seed)
        yield from at_least(where, 1, hidden=self.hidden)
        reads = self.kind is TeacherKind.vision_tower
        if self.weight > 0 and reads and not self.teacher:
            yield (
                f"{where}.teacher is empty, but {where}.weight={self.weight} asks for one; give "
                f"the folder of a SigLIP checkpoint, use {where}.weight=0, or "
                f"{where}.kind=random_features"
            )
        if not reads and self.teacher:
            yield (
                f"{where}.teacher={self.teacher} is not read with {where}.kind={self.kind}; set "
                "it to null"
            )

    def problems_with(self, model: IBQConfig) -> Iterator[str]:
        """What does not fit the tokenizer to be trained."""
        last = len(model.ch_mult)
        if self.weight > 0 and self.layer > last:
            yield (
                f"stage.distillation.layer={self.layer} is beyond the decoder's last stage; with "
                f"model.ch_mult={list(model.ch_mult)} use 0 to {last}"
            )


@dataclass(kw_only=True, slots=True)
class EntropyConfig:
    """Every latent vector sure of its code, all codes in use: mean over vectors of H(q) minus H of
    the mean q, where q = softmax(logits / ``temperature``) and the mean runs over the global batch.
    The usual weight is 0.05. ``sample_weight`` and ``codebook_weight`` weigh the two parts."""

    weight: float = 0.0
    temperature: float = 0.01
    sample_weight: float = 1.0
    codebook_weight: float = 1.0

    def problems(self) -> Iterator[str]:
        where = "stage.entropy"
        yield from at_least(
            where,
            0,
            weight=self.weight,
            sample_weight=self.sample_weight,
            codebook_weight=self.codebook_weight,
        )
        if not 1e-6 <= self.temperature < math.inf:
            yield (
                f"{where}.temperature={self.temperature} must be finite and at least 1e-6, or "
                "logits divided by it leave the range of fp32"
            )
        if self.weight > 0 and not (self.sample_weight > 0 or self.codebook_weight > 0):
            yield (
                f"{where}.sample_weight=0 and codebook_weight=0 leave nothing of the term; raise "
                f"one, or use {where}.weight=0"
            )
