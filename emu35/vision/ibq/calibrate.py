"""Starting the codebook from what the encoder already says.

A codebook drawn at random gives a young encoder no direction: few rows ever win, and those that do
pull the encoder onto themselves. Large runs recover; short ones do not. With
``stage.quantizer_warmup`` the first steps therefore train encoder and decoder alone, after which
this module moves the latent vectors to the origin, scales them, and places the codebook rows on
them. The moves are absorbed by the 1x1 convolutions before and after the quantizer, so the network
computes what it did.

Codes are largest dot products, which favour long rows; hence all rows start with one length, and
the clustering goes by angle (spherical k-means, seeded as in k-means++). That length is chosen
such that a vector on its row has the logit ``MATCH_LOGIT``: much larger ones make the softmax hard
and starve index propagation of gradients, much smaller ones let every row answer to every vector.
"""

import torch

from emu35.vision.ibq.model import IBQ
from emu35.vision.ibq.nearest import nearest_codes

MATCH_LOGIT = 8.0

ROUNDS = 5
"""Rounds of k-means; the training that follows refines the rows anyway."""

SPREAD_LIMIT = 8192
"""Most rows that are seeded one after another; larger codebooks start from a plain sample."""

VECTORS_PER_ROW = 6
MOST_VECTORS = 1 << 18


def pictures_needed(*, num_codes: int, codes_per_picture: int) -> int:
    """How many pictures give enough latent vectors to place ``num_codes`` rows."""
    vectors = min(VECTORS_PER_ROW * num_codes, MOST_VECTORS)
    return -(-vectors // codes_per_picture)


@torch.no_grad()
def calibrate(models: list[IBQ], *, latents_ND: torch.Tensor, generator: torch.Generator) -> None:
    """Centre and scale the latents of ``models`` and place their codebooks, in place.

    Args:
        models: the model whose latents these are, and its average; all get the same change.
        latents_ND: latent vectors of the first, fp32.
        generator: a CPU generator; equal seeds give equal codebooks.
    """
    centre_D = latents_ND.mean(dim=0)
    offset_ND = latents_ND - centre_D
    length = offset_ND.norm(dim=1).square().mean().sqrt().clamp_min(1e-6)
    scale = MATCH_LOGIT**0.5 / length
    rows_KD = _directions(
        offset_ND,
        count=models[0].config.n_embed,
        generator=generator,
    )
    for model in models:
        _move(model, centre_D=centre_D, scale=scale)
        model.quantize.codebook_KD.copy_(rows_KD * MATCH_LOGIT**0.5)


def _move(model: IBQ, *, centre_D: torch.Tensor, scale: torch.Tensor) -> None:
    """Latents become (z - centre) * scale, and what follows the quantizer undoes it."""
    before, after = model.quant_conv, model.post_quant_conv
    assert before.bias is not None
    assert after.bias is not None
    before.weight.mul_(scale)
    before.bias.sub_(centre_D).mul_(scale)
    after.bias.add_(after.weight[:, :, 0, 0] @ centre_D)
    after.weight.div_(scale)


def _directions(
    vectors_ND: torch.Tensor, *, count: int, generator: torch.Generator
) -> torch.Tensor:
    """``count`` unit vectors spread over the directions of ``vectors_ND``."""
    unit_ND = torch.nn.functional.normalize(vectors_ND, dim=1)
    if count <= SPREAD_LIMIT:
        rows_KD = _spread(unit_ND, count=count, generator=generator)
    else:
        picks = torch.randint(unit_ND.shape[0], (count,), generator=generator)
        rows_KD = unit_ND[picks.to(unit_ND.device)]
    for _ in range(ROUNDS):
        rows_KD = _recentred(rows_KD, unit_ND=unit_ND)
    return rows_KD


def _spread(unit_ND: torch.Tensor, *, count: int, generator: torch.Generator) -> torch.Tensor:
    """Seeds drawn one by one, each with probability proportional to its distance to the rest."""
    seeds = torch.zeros(count, dtype=torch.int64, device=unit_ND.device)
    apart_N = torch.full_like(unit_ND[:, 0], 2.0)
    for index in range(count):
        weights = apart_N.clamp_min(1e-9).cpu()
        seed = torch.multinomial(weights, 1, generator=generator)[0]
        seeds[index] = seed
        apart_N = torch.minimum(apart_N, 1 - unit_ND @ unit_ND[seed])
    return unit_ND[seeds]


def _recentred(rows_KD: torch.Tensor, *, unit_ND: torch.Tensor) -> torch.Tensor:
    """Every row moved to the mean direction of the vectors it wins; idle rows stay."""
    codes_N = nearest_codes(unit_ND, codebook_KD=rows_KD)
    sums_KD = torch.zeros_like(rows_KD).index_add_(0, codes_N, unit_ND)
    lengths_K1 = sums_KD.norm(dim=1, keepdim=True)
    return torch.where(lengths_K1 > 0, sums_KD / lengths_K1.clamp_min(1e-12), rows_KD)
