"""The whole objective of the tokenizer: the terms that have a weight, and what is logged of them.

The discriminator's side is beside the generator's, because both read the same reconstructions.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from emu35.config import IBQConfig, IBQStageConfig
from emu35.parallel.collectives import world_size
from emu35.stages.ibq.over_ranks import everyone, sum_over_ranks
from emu35.vision.ibq.entropy import EntropySettings
from emu35.vision.ibq.losses import IBQWeights, ibq_losses
from emu35.vision.ibq.model import IBQ, Reconstruction, Through
from emu35.vision.ibq.objective.adversarial import build_adversary
from emu35.vision.ibq.objective.distillation import build_distillation
from emu35.vision.ibq.objective.perceptual import build_perceptual

ADVERSARY_SEED, PROJECTOR_SEED = 1, 2
"""Added to the run's seed, so that no two networks start from the same numbers."""


@dataclass(kw_only=True, slots=True)
class Terms:
    """``total`` is what is minimised, ``logged`` its unweighted parts, without gradient."""

    total: torch.Tensor
    logged: dict[str, torch.Tensor]


class Objective:
    """Terms by the configuration; one of weight 0 is None, loads nothing and computes nothing."""

    def __init__(
        self, stage: IBQStageConfig, *, model: IBQConfig, seed: int, device: torch.device
    ) -> None:
        """
        Raises:
            ConfigError: weights or teacher cannot be had.
        """
        self._stage = stage
        self._weights = IBQWeights(
            reconstruction=stage.reconstruction_weight,
            mse=stage.mse_weight,
            quantization=stage.quantization_weight,
            commitment=stage.commitment,
        )
        self._perceptual = build_perceptual(stage.perceptual, device=device)
        self.distillation = build_distillation(
            stage.distillation, model=model, seed=seed + PROJECTOR_SEED, device=device
        )
        self.adversary = build_adversary(
            stage.adversarial, seed=seed + ADVERSARY_SEED, device=device, group=everyone()
        )
        self._entropy = (
            EntropySettings(temperature=stage.entropy.temperature, group=everyone())
            if stage.entropy.weight > 0
            else None
        )

    def generator(self, tokenizer: IBQ) -> nn.ModuleDict:
        """What the generator's optimizer trains: ``tokenizer``, and the projector if there is
        one."""
        parts: dict[str, nn.Module] = {"tokenizer": tokenizer}
        if self.distillation is not None:
            parts["projector"] = self.distillation.projector
        return nn.ModuleDict(parts)

    def reconstruct(
        self, tokenizer: IBQ, *, pixels_B3HW: torch.Tensor, through: Through
    ) -> Reconstruction:
        """The round trip, with everything that the terms need of it."""
        keep = () if self.distillation is None else (self.distillation.layer,)
        return tokenizer(pixels_B3HW, through=through, entropy=self._entropy, keep=keep)

    def generator_terms(
        self, output: Reconstruction, *, pixels_B3HW: torch.Tensor, step: int
    ) -> Terms:
        """The generator's loss on one micro-batch."""
        stage = self._stage
        base = ibq_losses(output, pixels_B3HW=pixels_B3HW, weights=self._weights)
        logged = {
            "loss_reconstruction": base.reconstruction,
            "loss_quantization": base.quantization,
        }
        weighted = [base.total]
        zero = torch.zeros_like(base.total)
        if self._weights.mse > 0:
            logged["loss_mse"] = base.mse
        if self._perceptual is not None:
            distance_B = self._perceptual(output.pixels_B3HW, target_BCHW=pixels_B3HW)
            logged["loss_perceptual"] = distance_B.mean()
            weighted.append(stage.perceptual.weight * logged["loss_perceptual"])
        if self._entropy is not None:
            entropy = None if output.quantized is None else output.quantized.entropy
            logged |= dict.fromkeys(("loss_entropy", "entropy_sample", "entropy_codebook"), zero)
            if entropy is not None:
                logged["loss_entropy"] = entropy.loss(
                    sample_weight=stage.entropy.sample_weight,
                    codebook_weight=stage.entropy.codebook_weight,
                )
                logged |= {"entropy_sample": entropy.sample, "entropy_codebook": entropy.codebook}
                weighted.append(stage.entropy.weight * logged["loss_entropy"])
        if self.distillation is not None:
            features_BCHW = output.features[self.distillation.layer]
            logged["loss_distillation"] = self.distillation(features_BCHW, pixels_B3HW=pixels_B3HW)
            weighted.append(stage.distillation.weight * logged["loss_distillation"])
        if self.adversary is not None:
            logged["loss_generator"] = zero
            weight = self.adversary.generator_weight(step)
            if weight > 0:
                logged["loss_generator"] = self.adversary.generator_loss(output.pixels_B3HW)
                weighted.append(weight * logged["loss_generator"])
        total = torch.stack(weighted).sum() if len(weighted) > 1 else base.total
        return Terms(total=total, logged={"loss": total, **logged})

    def discriminator_learns(self, step: int) -> bool:
        """Whether ``step`` trains a discriminator."""
        return self.adversary is not None and self.adversary.discriminator_learns(step)

    def discriminator_terms(self, output: Reconstruction, *, pixels_B3HW: torch.Tensor) -> Terms:
        """The discriminator's loss on one micro-batch; the generator gets no gradient."""
        assert self.adversary is not None
        losses = self.adversary.discriminator_losses(
            pixels_B3HW=pixels_B3HW, reconstructed_B3HW=output.pixels_B3HW
        )
        return Terms(
            total=losses.total,
            logged={
                "loss_discriminator": losses.total,
                "loss_hinge": losses.hinge,
                "loss_lecam": losses.lecam,
                "logits_real": losses.real,
                "logits_fake": losses.fake,
            },
        )

    @torch.no_grad()
    def follow(self, means: dict[str, float]) -> None:
        """Move LeCAM's anchors to the mean logits of a step that was made."""
        assert self.adversary is not None
        real, fake = (
            torch.tensor(means[key], device=self.adversary.anchors.real.device)
            for key in ("logits_real", "logits_fake")
        )
        self.adversary.anchors.update(real=real, fake=fake)


@dataclass(kw_only=True, slots=True)
class Means:
    """Means over the micro-batches of a step, and over the ranks."""

    micro_batches: int
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """One micro-batch; every one, on every rank, brings the same names."""
        for name, value in values.items():
            share = value.detach().float() / self.micro_batches
            self.sums[name] = self.sums[name] + share if name in self.sums else share

    def over_ranks(self) -> dict[str, float]:
        """Collective."""
        totals = sum_over_ranks(torch.stack(list(self.sums.values()))) / world_size()
        return dict(zip(self.sums, totals.tolist(), strict=True))
