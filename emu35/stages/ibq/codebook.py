"""The codebook's start, after the steps that train encoder and decoder alone."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from emu35.parallel.collectives import world_size
from emu35.vision.ibq.calibrate import calibrate, pictures_needed
from emu35.vision.ibq.model import IBQ
from emu35.vision.pictures import AspectPictures, SquarePictures


@torch.no_grad()
def start_codebook(
    models: list[IBQ],
    *,
    pictures: SquarePictures | AspectPictures,
    resolution: int,
    batch: int,
    to_device: Callable[[np.ndarray], torch.Tensor],
    seed: int,
    beat: Callable[[], None],
) -> None:
    """Place the codebook of ``models`` (the trained one, then its average) on the latents of the
    first training samples, alike on all ranks. ``beat`` is called between batches."""
    model = models[0]
    side = resolution // model.config.factor
    count = pictures_needed(num_codes=model.config.n_embed, codes_per_picture=side * side)
    model.eval()
    latents: list[torch.Tensor] = []
    for first in range(0, count, batch):
        beat()
        samples = range(first, min(first + batch, count))
        pixels = np.stack([pictures.square(sample) for sample in samples])
        z_BDHW = model.latents(to_device(pixels))
        latents.append(z_BDHW.permute(0, 2, 3, 1).flatten(0, 2))
    calibrate(
        models,
        latents_ND=torch.cat(latents),
        generator=torch.Generator().manual_seed(seed),
    )
    if world_size() > 1:
        # The same arithmetic on unlike hosts may differ in the last bit.
        for one in models:
            for weight in one.parameters():
                dist.broadcast(weight.detach(), src=0)
