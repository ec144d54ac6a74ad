"""The tokenizer network: encoder, quantizer, decoder, as one module of the official key names."""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import nn

from emu35.config import IBQConfig
from emu35.vision.ibq.blocks import Decoder, Encoder
from emu35.vision.ibq.entropy import EntropySettings
from emu35.vision.ibq.nearest import nearest_codes
from emu35.vision.ibq.quantizer import Quantized, Quantizer


@dataclass(kw_only=True, slots=True)
class Reconstruction:
    """Reconstructed pixels ``[B, 3, H, W]`` (not clamped) and the quantization behind them.

    ``quantized`` is None where the quantizer was bypassed; ``features`` has those of the decoder's
    stages that were asked for.
    """

    pixels_B3HW: torch.Tensor
    quantized: Quantized | None
    features: dict[int, torch.Tensor] = field(default_factory=dict)


class Through(StrEnum):
    """What lies between encoder and decoder: the codebook, or nothing (latents go on as is)."""

    codebook = "codebook"
    nothing = "nothing"


class IBQ(nn.Module):
    """Image tokenizer (paper section 2.3); 455,336,963 parameters at the default config.

    ``forward`` is the differentiable round trip for training. ``encode`` and ``decode`` are the two
    halves of the codec and carry no gradient.
    """

    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config.n_embed, dim=config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def forward(
        self,
        pixels_B3HW: torch.Tensor,
        *,
        through: Through = Through.codebook,
        entropy: EntropySettings | None = None,
        keep: Collection[int] = (),
    ) -> Reconstruction:
        """The round trip; ``keep`` numbers decoder stages (``blocks.decoder_channels``) whose
        features are returned, and with ``entropy`` the quantization has its entropies."""
        z_BDHW = self.latents(pixels_B3HW)
        quantized = self.quantize(z_BDHW, entropy=entropy) if through is Through.codebook else None
        chosen_BDHW = z_BDHW if quantized is None else quantized.z_q_BDHW
        decoded = self.decoder(self.post_quant_conv(chosen_BDHW), keep=keep)
        return Reconstruction(
            pixels_B3HW=decoded.pixels_B3HW, quantized=quantized, features=decoded.features
        )

    def latents(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Continuous latent vectors ``[B, D, H / factor, W / factor]``, before quantization."""
        return self.quant_conv(self.encoder(pixels_B3HW))

    @torch.no_grad()
    def encode(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Codes ``[B, H / factor, W / factor]`` int64; H and W must be multiples of the factor."""
        return self.codes(self.latents(pixels_B3HW))

    @torch.no_grad()
    def codes(self, z_BDHW: torch.Tensor) -> torch.Tensor:
        """Codes ``[B, H / factor, W / factor]`` int64 of :meth:`latents`."""
        z_BHWD = z_BDHW.permute(0, 2, 3, 1)
        codes_N = nearest_codes(z_BHWD.flatten(0, 2), codebook_KD=self.quantize.codebook_KD)
        return codes_N.view(z_BHWD.shape[:3])

    @torch.no_grad()
    def decode(self, codes_BHW: torch.Tensor) -> torch.Tensor:
        """Pixels ``[B, 3, H * factor, W * factor]`` of codes, not clamped to [-1, 1]."""
        z_BHWD = self.quantize.codebook_KD[codes_BHW]
        return self.decoder(self.post_quant_conv(z_BHWD.permute(0, 3, 1, 2))).pixels_B3HW
