"""Qwen3 weights as the start of an Emu3.5 model.

Both share the architecture and the 151,643 mergeable ids of the text table (Emu3.5 starts from a
Qwen3 model, paper section 3.2). Beyond those ids the vocabularies differ: Qwen3 continues with its
own chat tokens and padding rows, Emu3.5 with 211 specials and the visual codes. So the first
151,643 rows are taken over and the others drawn anew.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from emu35.errors import ReleaseError
from emu35.tokens.vocabulary import Vocabulary

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(kw_only=True, slots=True, frozen=True)
class Extended(Mapping[str, torch.Tensor]):
    """Qwen3's tensors with the embedding and the output layer fitted to another vocabulary.

    A new row is N(0, ``std``), drawn by a generator seeded with ``seed`` (the output layer with
    ``seed + 1``), the same on every machine; the PAD row of the embedding is zero. Tied weights
    become two matrices that start from the same rows.
    """

    base: Mapping[str, torch.Tensor]
    vocabulary: Vocabulary
    std: float
    seed: int
    tied: bool

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == EMBEDDING:
            matrix = self._fit(self.base[EMBEDDING], seed=self.seed)
            matrix[self.vocabulary.pad] = 0
            return matrix
        if name == OUTPUT:
            return self._fit(self.base[EMBEDDING if self.tied else OUTPUT], seed=self.seed + 1)
        return self.base[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.base
        if self.tied and OUTPUT not in self.base:
            yield OUTPUT

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _fit(self, old: torch.Tensor, *, seed: int) -> torch.Tensor:
        taken = self.vocabulary.n_text
        generator = torch.Generator().manual_seed(seed)
        new = torch.empty(self.vocabulary.size - taken, old.shape[1])
        new.normal_(0.0, self.std, generator=generator)
        return torch.cat([old[:taken], new.to(old.dtype)])


def extend(
    base: Mapping[str, torch.Tensor],
    *,
    vocabulary: Vocabulary,
    rows: int,
    std: float,
    seed: int,
    tied: bool,
    message: Callable[[str], object],
) -> Extended:
    """Fit Qwen3's tensors to ``vocabulary``; ``rows`` is their vocab_size.

    Raises:
        ReleaseError: the matrices have fewer rows than the text table has ids.
    """
    taken = vocabulary.n_text
    if rows < taken:
        raise ReleaseError(
            f"this Qwen3 model has {rows} embedding rows, fewer than the {taken} ids of the text "
            "table; only models with the full Qwen vocabulary can be extended"
        )
    message(
        f"vocabulary {rows:,} -> {vocabulary.size:,}: {taken:,} text rows taken over, "
        f"{vocabulary.size - taken:,} rows drawn from N(0, {std}) with seed {seed} "
        f"({vocabulary.visual_start - taken} specials, {vocabulary.codebook_size:,} visual codes; "
        "the embedding of PAD is zero), "
        f"{rows - taken:,} Qwen rows dropped"
        + ("; the tied output layer starts from the embedding's text rows" if tied else "")
    )
    return Extended(base=base, vocabulary=vocabulary, std=std, seed=seed, tied=tied)
