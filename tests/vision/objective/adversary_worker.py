"""One step of discriminator and generator on this rank's share of four pictures, under torchrun or
alone. Usage: adversary_worker.py RESULT.pt

Saved by rank 0: losses, gradients of the discriminator (mean over ranks), of all reconstructions,
statistics and anchors.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from emu35.config.tokenizer_objective import AdversarialConfig
from emu35.vision.ibq.objective.adversarial import Adversary

PICTURES = 4


def main(result: Path) -> None:
    dist.init_process_group("gloo")
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    adversary = Adversary(AdversarialConfig(weight=0.1, ndf=4), seed=1, group=group)
    generator = torch.Generator().manual_seed(2)
    # Large offsets and unlike spreads: a batch norm of each rank's own would show at once.
    scale = torch.tensor([0.1, 0.3, 0.6, 1.0]).view(-1, 1, 1, 1)
    real, fake = (
        torch.rand(PICTURES, 3, 32, 32, generator=generator) * scale - scale for _ in range(2)
    )
    share = slice(rank * PICTURES // ranks, (rank + 1) * PICTURES // ranks)
    own = fake[share].clone().requires_grad_()
    losses = adversary.discriminator_losses(pixels_B3HW=real[share], reconstructed_B3HW=own)
    losses.total.backward()
    adversary.anchors.update(real=losses.real, fake=losses.fake)
    after = adversary.discriminator_losses(pixels_B3HW=real[share], reconstructed_B3HW=own)
    adversarial = adversary.generator_loss(own)
    adversarial.backward()
    assert own.grad is not None
    scalars = {
        "hinge": losses.hinge,
        "lecam": after.lecam,
        "generator": adversarial,
    }
    found = {name: over_ranks(scalar) for name, scalar in scalars.items()}
    for name, weight in adversary.named_parameters():
        assert weight.grad is not None
        found[f"gradient of {name}"] = over_ranks(weight.grad)
    found |= dict(adversary.named_buffers())
    slopes = [torch.empty_like(own.grad) for _ in range(ranks)]
    dist.all_gather(slopes, own.grad)
    # A rank's loss is the mean over its own pictures; the run's is the mean over the ranks.
    found["gradient of reconstructions"] = torch.cat(slopes) / ranks
    if rank == 0:
        torch.save(found, result)
    dist.destroy_process_group()


def over_ranks(values: torch.Tensor) -> torch.Tensor:
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
