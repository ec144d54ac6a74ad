"""Walking the codebook: its rows in chunks, and the logits of each, computed anew or kept."""

import math
from collections.abc import Iterator

import torch

BITS = math.log2(math.e)
"""Bits a nat. On a CPU exp2 takes a third of the time of exp, and less than a tenth where the
result underflows, which at a temperature of 0.01 it does nearly everywhere."""

KEPT_ELEMENTS = 3 << 25
"""Logits kept between the passes: 384 MiB in fp32, three quarters of those of 1,024 vectors and
131,072 rows."""


class Chunks:
    """Walks the codebook: yields rows as a slice, the rows themselves ``[C, D]``, and ``buffers``
    matrices ``[N, C]`` to write into, the same memory for every chunk.

    ``kept`` are the logits of the first chunks, as far as they are kept.
    """

    def __init__(
        self, z_ND: torch.Tensor, *, codebook_KD: torch.Tensor, rows: int, buffers: int
    ) -> None:
        self.z_ND, self.codebook_KD = z_ND, codebook_KD
        self.rows = min(rows, codebook_KD.shape[0])
        self.floor = exponent_floor(z_ND.dtype)
        self.kept: list[torch.Tensor] = []
        self._buffers = z_ND.new_empty(buffers, z_ND.shape[0] * self.rows)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor]]]:
        vectors, entries = self.z_ND.shape[0], self.codebook_KD.shape[0]
        for start in range(0, entries, self.rows):
            part_CD = self.codebook_KD[start : start + self.rows]
            width = part_CD.shape[0]
            # Contiguous also where the last chunk is narrower.
            matrices = [flat[: vectors * width].view(vectors, width) for flat in self._buffers]
            yield slice(start, start + width), part_CD, matrices

    def keep(self) -> None:
        """Make room for logits to keep."""
        vectors, entries = self.z_ND.shape[0], self.codebook_KD.shape[0]
        fitting = KEPT_ELEMENTS // (vectors * self.rows)
        for start in range(0, entries, self.rows)[:fitting]:
            width = min(self.rows, entries - start)
            self.kept.append(self.z_ND.new_empty(vectors, width))

    def logits(self, rows: slice, *, out: torch.Tensor) -> torch.Tensor:
        """The logits of a chunk ``[N, C]``, where they are kept or else in ``out``."""
        room_NC = self._kept(rows)
        room_NC = out if room_NC is None else room_NC
        return torch.mm(self.z_ND, self.codebook_KD[rows].T, out=room_NC)

    def relative_logits(
        self, rows: slice, *, best_N: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """Logits less the largest one, in ``out``, once :meth:`logits` has been called."""
        kept_NC = self._kept(rows)
        if kept_NC is None:
            return torch.mm(self.z_ND, self.codebook_KD[rows].T, out=out).sub_(best_N[:, None])
        return torch.sub(kept_NC, best_N[:, None], out=out)

    def _kept(self, rows: slice) -> torch.Tensor | None:
        index = rows.start // self.rows
        return self.kept[index] if index < len(self.kept) else None


def exponent_floor(dtype: torch.dtype) -> float:
    """The least exponent of 2 worth taking, for fp32 that of 5e-31: a fifth of the range is left,
    so that products with what is found are no denormal numbers, which are slow."""
    return 0.8 * math.log2(torch.finfo(dtype).tiny)
