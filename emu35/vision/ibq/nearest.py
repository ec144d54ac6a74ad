"""The nearest code of a vector: the codebook row with the largest dot product.

Neither softmax nor one-hot vectors are built. The codebook is walked in chunks that keep the logits
in a processor's cache, with a running maximum. What this costs beyond the product itself was
measured: torch finds the position of a maximum ten times slower than the maximum, and most chunks
improve on few vectors, so positions are looked for in those rows only.
"""

import torch

CPU_CHUNK_ELEMENTS = 1 << 20
"""Logits held at once on a CPU (N x chunk): 4 MiB in fp32. With an eighth of that, threads wait for
each other too often; with eight times as much, work leaves the cache and takes 10 to 20% longer."""

GPU_CHUNK_ELEMENTS = 1 << 23
"""The same on a GPU: 32 MiB in fp32, large enough to keep it busy."""

MIN_CHUNK = 128
"""Fewest rows a chunk: the product of a matrix with fewer is slow."""

VECTORS_AT_ONCE = 2048
"""Vectors searched for together, so that memory depends on neither their number nor the codebook's
size."""


@torch.no_grad()
def nearest_codes(
    z_ND: torch.Tensor, *, codebook_KD: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """Codes ``[N]`` int64 by the largest dot product in fp32; ties go to the lowest index.

    Half-precision logits would flip a few percent of the codes at 131,072 entries.
    """
    codes_N = torch.empty(z_ND.shape[0], dtype=torch.int64, device=z_ND.device)
    for part_MD, codes_M in zip(
        z_ND.split(VECTORS_AT_ONCE), codes_N.split(VECTORS_AT_ONCE), strict=True
    ):
        codes_M.copy_(_search(part_MD.float(), codebook_KD=codebook_KD, chunk=chunk))
    return codes_N


def _search(z_ND: torch.Tensor, *, codebook_KD: torch.Tensor, chunk: int | None) -> torch.Tensor:
    rows = chunk or chunk_rows(z_ND)
    nearest = Nearest(z_ND)
    for start in range(0, codebook_KD.shape[0], rows):
        nearest.update(z_ND @ codebook_KD[start : start + rows].float().T, start=start)
    return nearest.codes_N


class Nearest:
    """The largest logit of every vector among the chunks seen so far, and its code."""

    def __init__(self, z_ND: torch.Tensor) -> None:
        self.best_N = torch.full_like(z_ND[:, 0], -torch.inf)
        self.codes_N = torch.zeros(z_ND.shape[0], dtype=torch.int64, device=z_ND.device)

    def update(self, logits_NC: torch.Tensor, *, start: int) -> torch.Tensor:
        """Fold in one chunk, whose first row is ``start``; an equal later logit does not win. The
        chunk's own largest logits ``[N]``."""
        chunk_best_N = logits_NC.amax(dim=1)
        larger_M = (chunk_best_N > self.best_N).nonzero()[:, 0]
        self.codes_N[larger_M] = logits_NC[larger_M].argmax(dim=1) + start
        torch.maximum(self.best_N, chunk_best_N, out=self.best_N)
        return chunk_best_N


def chunk_rows(z_ND: torch.Tensor, *, vectors: int | None = None) -> int:
    """Codebook rows a chunk, such that the logits of ``z_ND`` (or ``vectors`` of its kind) stay
    within bounds."""
    elements = CPU_CHUNK_ELEMENTS if z_ND.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    return max(MIN_CHUNK, elements // max(1, vectors or z_ND.shape[0]))
