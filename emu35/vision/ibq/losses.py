"""Terms of the objective that need nothing but pixels and the quantization (paper section 5.2).

Each is a mean over its input, so that a global batch may be cut into micro-batches and ranks of
equal size without changing the loss. ``objective`` has the terms with networks of their own, and
the stage adds all of them up.
"""

from dataclasses import dataclass

import torch

from emu35.vision.ibq.model import Reconstruction
from emu35.vision.ibq.quantizer import Quantized


@dataclass(kw_only=True, slots=True, frozen=True)
class IBQWeights:
    """Weight of each term; ``commitment`` weighs the codebook's part of the quantization loss."""

    reconstruction: float = 1.0
    mse: float = 0.0
    quantization: float = 1.0
    commitment: float = 0.25


@dataclass(kw_only=True, slots=True)
class IBQLosses:
    """Scalars: the weighted ``total`` to minimise, and the terms before weighting."""

    total: torch.Tensor
    reconstruction: torch.Tensor
    mse: torch.Tensor
    quantization: torch.Tensor


def ibq_losses(
    reconstruction: Reconstruction, *, pixels_B3HW: torch.Tensor, weights: IBQWeights
) -> IBQLosses:
    """Every term for one micro-batch, in fp32."""
    pixel_term = reconstruction_loss(reconstruction.pixels_B3HW, target_B3HW=pixels_B3HW)
    quantized = reconstruction.quantized
    code_term = (
        torch.zeros_like(pixel_term)
        if quantized is None
        else quantization_loss(quantized, commitment=weights.commitment)
    )
    square_term = mean_square_loss(reconstruction.pixels_B3HW, target_B3HW=pixels_B3HW)
    return IBQLosses(
        total=weights.reconstruction * pixel_term
        + weights.mse * square_term
        + weights.quantization * code_term,
        reconstruction=pixel_term,
        mse=square_term,
        quantization=code_term,
    )


def reconstruction_loss(pixels_B3HW: torch.Tensor, *, target_B3HW: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of pixels in [-1, 1]."""
    return (pixels_B3HW.float() - target_B3HW.float()).abs().mean()


def mean_square_loss(pixels_B3HW: torch.Tensor, *, target_B3HW: torch.Tensor) -> torch.Tensor:
    """Mean squared difference, for short runs on simple pictures.

    The absolute difference alone is least where a pixel has its median value: as long as the codes
    say little about a small object, painting background over it costs nothing to the gradient,
    and training rests there. The square is drawn to the mean instead and leaves that plateau.
    """
    return (pixels_B3HW.float() - target_B3HW.float()).square().mean()


def quantization_loss(quantized: Quantized, *, commitment: float) -> torch.Tensor:
    """Three squared distances between latent vectors and their codebook rows.

    All three have the same value and differ in who is moved: the first, through the propagated
    gradient, everything; the second the encoder; the third, times ``commitment``, the chosen rows.
    """
    z_BDHW, hard_BDHW = quantized.z_BDHW, quantized.hard_BDHW
    both = (quantized.z_q_BDHW - z_BDHW).square().mean()
    encoder = (hard_BDHW.detach() - z_BDHW).square().mean()
    rows = (hard_BDHW - z_BDHW.detach()).square().mean()
    return both + encoder + commitment * rows
