"""How much of its codebook an image tokenizer uses, and what its codes cost."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeUsage:
    """Of ``codes`` codes: ``used`` of the ``codebook_size`` entries occur at all.

    ``entropy`` is that of their frequencies in bits a code, estimated by counting: with not many
    more codes than entries it is too low, and so is ``used``.
    """

    codes: int
    codebook_size: int
    used: int
    entropy: float

    @property
    def usage(self) -> float:
        """The share of entries that occur."""
        return self.used / self.codebook_size

    @property
    def perplexity(self) -> float:
        """2 to the entropy: as many entries, used equally often, would tell as much."""
        return 2.0**self.entropy

    def bits_per_pixel(self, *, factor: int) -> float:
        """Of codes that are all kept in the same number of bits; one stands for factor x factor
        pixels."""
        return math.log2(self.codebook_size) / factor**2

    def entropy_bits_per_pixel(self, *, factor: int) -> float:
        """Of codes kept by an ideal coder that knows their frequencies and nothing else."""
        return self.entropy / factor**2


def code_usage(counts_K: torch.Tensor) -> CodeUsage:
    """That of codes which were met ``counts_K`` times each (integers [K])."""
    total = int(counts_K.sum())
    share_K = counts_K.double() / max(total, 1)
    return CodeUsage(
        codes=total,
        codebook_size=len(counts_K),
        used=int((counts_K > 0).sum()),
        entropy=float(torch.special.entr(share_K).sum()) / math.log(2),
    )
