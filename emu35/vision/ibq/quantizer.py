"""The quantizer as a module: grids of latent vectors in, grids of codebook rows and codes out.

``propagation`` holds the kernel and its definition, ``entropy`` the entropy term, ``nearest`` the
search without gradients.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from emu35.vision.ibq.entropy import EntropySettings, EntropyTerms
from emu35.vision.ibq.nearest import nearest_codes
from emu35.vision.ibq.propagation import full_precision, quantize

__all__ = ["Quantized", "Quantizer", "nearest_codes"]


@dataclass(kw_only=True, slots=True)
class Quantized:
    """What quantization yields, all grids of ``[B, D, H, W]`` except the codes.

    ``z`` is the encoder's output, ``z_q`` has a codebook row's value and the propagated gradient,
    ``hard`` has the same value and sends its gradient to the chosen rows alone. ``entropy`` is None
    unless it was asked for.
    """

    z_BDHW: torch.Tensor
    z_q_BDHW: torch.Tensor
    hard_BDHW: torch.Tensor
    codes_BHW: torch.Tensor
    entropy: EntropyTerms | None = None


class Quantizer(nn.Module):
    """The codebook ``[K, D]``; always computes in the codebook's precision, never autocast."""

    def __init__(self, num_codes: int, *, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)

    @property
    def codebook_KD(self) -> torch.Tensor:
        return self.embedding.weight

    def forward(self, z_BDHW: torch.Tensor, *, entropy: EntropySettings | None = None) -> Quantized:
        """Quantize ``[B, D, H, W]``; the entropies, at twice the cost, if ``entropy`` is given."""
        batch, dim, height, width = z_BDHW.shape
        with full_precision(z_BDHW.device):
            z_BDHW = z_BDHW.to(self.codebook_KD.dtype)
            z_ND = z_BDHW.permute(0, 2, 3, 1).reshape(-1, dim)
            found = quantize(z_ND, codebook_KD=self.codebook_KD, entropy=entropy)
            hard_ND = functional.embedding(found.codes_N, self.codebook_KD)
        grid = (batch, height, width)
        return Quantized(
            z_BDHW=z_BDHW,
            z_q_BDHW=found.z_q_ND.unflatten(0, grid).permute(0, 3, 1, 2),
            hard_BDHW=hard_ND.unflatten(0, grid).permute(0, 3, 1, 2),
            codes_BHW=found.codes_N.unflatten(0, grid),
            entropy=found.entropy,
        )
