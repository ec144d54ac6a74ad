"""What discriminator and tokenizer learn from each other: hinge, LeCAM, non-saturating softplus.

The two are trained by two losses, and neither gradient reaches the other's weights:
:meth:`Adversary.discriminator_losses` sees reconstructions as constants, and
:meth:`Adversary.generator_loss` sees the discriminator's weights as constants.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from emu35.config.tokenizer_objective import AdversarialConfig
from emu35.parallel.collectives import sum_over
from emu35.vision.ibq.objective.discriminator import PatchDiscriminator, initialize_discriminator


@dataclass(kw_only=True, slots=True)
class DiscriminatorLosses:
    """Scalars of one micro-batch: ``total`` = ``hinge`` + lecam_weight * ``lecam`` is minimised;
    ``real`` and ``fake`` are the mean logits, without gradient, that LeCAM's anchors follow."""

    total: torch.Tensor
    hinge: torch.Tensor
    lecam: torch.Tensor
    real: torch.Tensor
    fake: torch.Tensor


class Adversary(nn.Module):
    """Discriminator, LeCAM's anchors and the schedule; its state dict is all there is to resume.

    Only ``discriminator`` has parameters. ``group`` are the ranks that train together.
    """

    def __init__(
        self, config: AdversarialConfig, *, seed: int, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.discriminator = PatchDiscriminator(ndf=config.ndf, layers=config.layers, group=group)
        initialize_discriminator(self.discriminator, seed=seed)
        self.anchors = LecamAnchors(decay=config.lecam_decay, group=group)

    def generator_weight(self, step: int) -> float:
        """Weight of :meth:`generator_loss` in ``step``; 0 before its start."""
        since = step - self.config.start_step
        if since < 0:
            return 0.0
        return self.config.weight * min(1.0, (since + 1) / max(self.config.warmup_steps, 1))

    def discriminator_learns(self, step: int) -> bool:
        """Whether ``step`` trains the discriminator."""
        return self.config.weight > 0 and step >= self.config.discriminator_step

    def generator_loss(self, reconstructed_B3HW: torch.Tensor) -> torch.Tensor:
        """How unlike pictures the reconstructions look, unweighted; for the tokenizer alone."""
        constants = {
            name: weight.detach() for name, weight in self.discriminator.named_parameters()
        }
        logits_B1HW = functional_call(self.discriminator, constants, (reconstructed_B3HW,))
        return non_saturating_loss(logits_B1HW)

    def discriminator_losses(
        self, *, pixels_B3HW: torch.Tensor, reconstructed_B3HW: torch.Tensor
    ) -> DiscriminatorLosses:
        """The discriminator's objective on one micro-batch."""
        real_B1HW = self.discriminator(pixels_B3HW.detach())
        fake_B1HW = self.discriminator(reconstructed_B3HW.detach())
        hinge = hinge_loss(real_B1HW, fake_B1HW=fake_B1HW)
        lecam = self.anchors.penalty(real_B1HW, fake_B1HW=fake_B1HW)
        return DiscriminatorLosses(
            total=hinge + self.config.lecam_weight * lecam,
            hinge=hinge,
            lecam=lecam,
            real=real_B1HW.detach().mean(),
            fake=fake_B1HW.detach().mean(),
        )


class LecamAnchors(nn.Module):
    """Averages over steps of the mean logits of pictures and of reconstructions (LeCAM, arXiv
    2104.03310, section 3), which hold back a discriminator that has little data to learn from."""

    real: torch.Tensor
    fake: torch.Tensor

    def __init__(self, *, decay: float, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.decay = decay
        self.group = group
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def penalty(self, real_B1HW: torch.Tensor, *, fake_B1HW: torch.Tensor) -> torch.Tensor:
        """Mean square of how far real logits lie above the fake anchor and fake ones below the
        real anchor. The paper squares both distances; its authors' code, and this, leaves out the
        other sides, where the discriminator has nothing to be held back from."""
        above = functional.relu(real_B1HW - self.fake).square().mean()
        below = functional.relu(self.real - fake_B1HW).square().mean()
        return above + below

    @torch.no_grad()
    def update(self, *, real: torch.Tensor, fake: torch.Tensor) -> None:
        """Move the anchors, once a step, towards this rank's mean logits averaged over the ranks.

        Both are scalars: the mean over the step's micro-batches. So the anchors do not depend on
        how the global batch is cut.
        """
        ranks = 1 if self.group is None else dist.get_world_size(self.group)
        means = torch.stack([real, fake]).detach().float()
        means = sum_over(means, self.group) / ranks
        self.real.lerp_(means[0], 1 - self.decay)
        self.fake.lerp_(means[1], 1 - self.decay)


def build_adversary(
    config: AdversarialConfig,
    *,
    seed: int,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> Adversary | None:
    """The adversary that ``config`` asks for, on ``device``; None at weight 0."""
    return Adversary(config, seed=seed, group=group).to(device) if config.weight > 0 else None


def hinge_loss(real_B1HW: torch.Tensor, *, fake_B1HW: torch.Tensor) -> torch.Tensor:
    """Half the sum of mean relu(1 - real) and mean relu(1 + fake), patch by patch."""
    real = functional.relu(1 - real_B1HW).mean()
    fake = functional.relu(1 + fake_B1HW).mean()
    return (real + fake) / 2


def non_saturating_loss(fake_B1HW: torch.Tensor) -> torch.Tensor:
    """Mean over pictures of softplus(-logit), a picture's logit being the mean of its patches'."""
    return functional.softplus(-fake_B1HW.mean(dim=(1, 2, 3))).mean()
