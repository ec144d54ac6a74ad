"""A trained IBQ as an :class:`~emu35.vision.codec.ImageCodec`: evaluation mode, fp32, batched."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from emu35.errors import DataError
from emu35.vision.ibq.model import IBQ

BATCH_PIXELS = 4 * 512 * 512
"""Pixels that go through the network at once; larger batches are cut, one picture at the least."""


PRECISION = torch.float32
"""What codes are computed in. A code is the nearest of up to 131072; less precision flips some."""


class IBQCodec:
    """Encoding and decoding in fp32 without TF32, because lower precision flips codes.

    ``encode`` and ``decode`` accept tensors on any device and answer on the same one; the work is
    done on ``device``. ``name`` is what messages call the tokenizer.
    """

    def __init__(
        self, model: IBQ, *, device: torch.device, name: str = "the image tokenizer"
    ) -> None:
        self._name = name
        self._model = model.to(device=device, dtype=PRECISION).eval().requires_grad_(False)
        self._device = device

    @property
    def factor(self) -> int:
        return self._model.config.factor

    @property
    def codebook_size(self) -> int:
        return self._model.config.n_embed

    def encode(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Codes ``[B, H / factor, W / factor]`` int64 of pixels in [-1, 1].

        Raises:
            DataError: the pixels are not ``[B, 3, H, W]``, a side is no multiple of ``factor``, or
                the tokenizer diverged, so that there is no nearest code.
        """
        with _exact(self._device):
            codes = [self._model.codes(self._latents(part)) for part in self._parts(pixels_B3HW)]
        return torch.cat(codes).to(pixels_B3HW.device)

    def latents(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Latent vectors ``[B, D, H / factor, W / factor]`` fp32 of pixels in [-1, 1], before
        quantization.

        Raises:
            DataError: as :meth:`encode`.
        """
        with _exact(self._device):
            latents = [self._latents(part) for part in self._parts(pixels_B3HW)]
        return torch.cat(latents).to(pixels_B3HW.device)

    def _parts(self, pixels_B3HW: torch.Tensor) -> Sequence[torch.Tensor]:
        """As many pictures at a time as go through the network at once."""
        shape, factor = tuple(pixels_B3HW.shape), self.factor
        if len(shape) != 4 or shape[1] != 3:
            raise DataError(f"pixels of shape {shape}: an image codec encodes [B, 3, H, W]")
        height, width = shape[2:]
        if min(height, width) < factor or height % factor or width % factor:
            raise DataError(
                f"picture of {width} x {height} pixels: both sides must be multiples of {factor}; "
                "resize it with smart_resize first"
            )
        return pixels_B3HW.split(max(1, BATCH_PIXELS // (height * width)))

    def _latents(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        z_BDHW = self._model.latents(pixels_B3HW.to(self._device, PRECISION))
        # No comparison with NaN holds, so the search would answer 0 everywhere, as if it were sure.
        for what, values in (("latents", z_BDHW), ("codebook", self._model.quantize.codebook_KD)):
            if not bool(values.isfinite().all()):
                raise DataError(
                    f"{self._name} diverged: its {what} must be finite numbers, but hold NaN or "
                    "infinity; train it again with a lower optim.lr, or use another tokenizer"
                )
        return z_BDHW

    def decode(self, codes_BHW: torch.Tensor) -> torch.Tensor:
        """Pixels ``[B, 3, H * factor, W * factor]``, clamped to [-1, 1].

        Raises:
            DataError: the codes are not a non-empty ``[B, H, W]`` within the codebook.
        """
        shape = tuple(codes_BHW.shape)
        if len(shape) != 3 or 0 in shape:
            raise DataError(f"codes of shape {shape}: an image codec decodes [B, H, W]")
        lowest, highest = int(codes_BHW.min()), int(codes_BHW.max())
        if lowest < 0 or highest >= self.codebook_size:
            raise DataError(
                f"codes range from {lowest} to {highest}, but the codebook has "
                f"{self.codebook_size} entries; the codes come from another tokenizer"
            )
        pictures = max(1, BATCH_PIXELS // (shape[1] * shape[2] * self.factor**2))
        with _exact(self._device):
            pixels = [
                self._model.decode(part.to(self._device, torch.int64)).clamp_(-1, 1)
                for part in codes_BHW.split(pictures)
            ]
        return torch.cat(pixels).to(codes_BHW.device)


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """fp32 throughout: no autocast, no TF32, and no gradients."""
    precision = torch.get_float32_matmul_precision()
    # A run that trains in this process may have asked for TF32.
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
