"""What one rank finds, and how the ranks' findings join."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from emu35.parallel.collectives import objects_of_ranks, sum_over, world_size
from emu35.stages.tokenizer_eval.reading import LineFigures
from emu35.vision.frechet import Moments


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureFigures:
    """Picture ``number`` and its reconstruction: PSNR in dB, SSIM, LPIPS where it is measured, and
    cosines of its faces."""

    number: int
    psnr: float
    ssim: float
    lpips: float | None
    faces: tuple[float, ...]


@dataclass(kw_only=True, slots=True)
class Findings:
    """Of one tokenizer at one resolution, or of the originals (which have lines and moments alone).

    ``counts_K`` says how often each code was met, int64; ``moments`` are by feature space.
    """

    pictures: list[PictureFigures] = field(default_factory=list[PictureFigures])
    lines: list[LineFigures] = field(default_factory=list[LineFigures])
    counts_K: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    moments: Mapping[str, Moments] = field(default_factory=dict[str, Moments])

    def joined(self, *, device: torch.device) -> "Findings":
        """Those of all ranks, in the order of the pictures; the same everywhere. Collectives run on
        ``device``."""
        pictures = [each for found in objects_of_ranks(self.pictures) for each in found]
        # Lines of a picture are all on one rank, in their order, which sorting keeps.
        lines = [each for found in objects_of_ranks(self.lines) for each in found]
        return Findings(
            pictures=sorted(pictures, key=lambda each: each.number),
            lines=sorted(lines, key=lambda each: each.picture),
            counts_K=_summed(self.counts_K, device=device),
            moments={
                space: _joined_moments(moments, device=device)
                for space, moments in self.moments.items()
            },
        )


def _joined_moments(moments: Moments, *, device: torch.device) -> Moments:
    dimensions = len(moments.sum_D)
    parts = (np.array([float(moments.count)]), moments.sum_D, moments.products_DD.ravel())
    flat = _summed(torch.from_numpy(np.concatenate(parts)), device=device).numpy()
    joined = Moments(dimensions)
    joined.count = int(flat[0])
    joined.sum_D = flat[1 : dimensions + 1]
    joined.products_DD = flat[dimensions + 1 :].reshape(dimensions, dimensions)
    return joined


def _summed(values: torch.Tensor, *, device: torch.device) -> torch.Tensor:
    group = dist.group.WORLD if world_size() > 1 else None
    return sum_over(values.to(device, copy=True), group).cpu()
