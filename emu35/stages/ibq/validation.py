"""Held-out pictures through the averaged weights, and the first ones as a grid to look at."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from emu35.errors import DataError
from emu35.parallel.collectives import is_main, rank, world_size
from emu35.stages.ibq.files import RECONSTRUCTIONS, REJECTS, write_grid
from emu35.stages.ibq.over_ranks import sum_over_ranks
from emu35.vision.ibq.model import IBQ
from emu35.vision.pictures import SquarePictures

GRID_PICTURES = 16
"""Pictures in the reconstruction grid."""


@torch.no_grad()
def validate(
    model: IBQ, *, batches_B3HW: Iterator[torch.Tensor], run_dir: Path, device: torch.device
) -> dict[str, float]:
    """Metrics of what this and all other ranks' batches become on their way through the codes.

    Raises:
        DataError: no rank has a picture, or the grid cannot be written.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    used_K = torch.zeros(model.config.n_embed, device=device)
    shown: list[torch.Tensor] = []
    for pixels_B3HW in batches_B3HW:
        codes_BHW = model.encode(pixels_B3HW)
        decoded_B3HW = model.decode(codes_BHW).clamp_(-1, 1)
        used_K += torch.bincount(codes_BHW.flatten(), minlength=used_K.numel())
        totals += _picture_sums(decoded_B3HW, target_B3HW=pixels_B3HW)
        if is_main() and sum(len(rows) for rows in shown) < GRID_PICTURES:
            shown.append(torch.stack([pixels_B3HW, decoded_B3HW], dim=1).cpu())
    used_K = sum_over_ranks(used_K)
    pictures, error, psnr = sum_over_ranks(totals).tolist()
    if shown:
        write_grid(torch.cat(shown)[:GRID_PICTURES], path=run_dir / RECONSTRUCTIONS)
    if not pictures:
        raise DataError("none of the validation pictures can be used; see " + REJECTS)
    return {
        "loss_reconstruction": error / pictures,
        "psnr": psnr / pictures,
        "codebook_usage": share_used(used_K),
        "codes_used": float((used_K > 0).sum().item()),
        "codebook_perplexity": _perplexity(used_K),
        "pictures": pictures,
    }


def validation_batches(
    pictures: SquarePictures,
    *,
    count: int,
    batch: int,
    to_device: Callable[[np.ndarray], torch.Tensor],
    beat: Callable[[], None],
) -> Iterator[torch.Tensor]:
    """This rank's pictures ``[B, 3, H, W]``: every ``ranks``-th of the first ``count``. ``beat`` is
    called between them."""
    rows: list[np.ndarray] = []
    for index in range(rank(), min(count, len(pictures)), world_size()):
        beat()
        picture = pictures.centre(index)
        if picture is not None:
            rows.append(picture)
        if len(rows) == batch:
            yield to_device(np.stack(rows))
            rows = []
    if rows:
        yield to_device(np.stack(rows))


def share_used(counts_K: torch.Tensor) -> float:
    """The share of codes that were used."""
    return (counts_K > 0).float().mean().item()


def _perplexity(counts_K: torch.Tensor) -> float:
    """Effective number of codes: the exponential of the entropy of their frequencies."""
    share_K = counts_K / counts_K.sum().clamp_min(1)
    return torch.special.entr(share_K).sum().exp().item()


def _picture_sums(decoded_B3HW: torch.Tensor, *, target_B3HW: torch.Tensor) -> torch.Tensor:
    """(pictures, sum of mean absolute differences, sum of PSNR in dB) of one batch."""
    difference_BE = (decoded_B3HW - target_B3HW).double().flatten(1)
    mean_square_B = difference_BE.square().mean(dim=1).clamp_min(1e-12)
    psnr_B = 10 * torch.log10(4 / mean_square_B)  # pixels span 2, from -1 to 1
    count = torch.tensor(float(len(psnr_B)), dtype=torch.float64, device=psnr_B.device)
    return torch.stack([count, difference_BE.abs().mean(dim=1).sum(), psnr_B.sum()])
