"""Qwen3 weights as the start of an Emu3.5 model.

Both share the architecture and the 151,643 mergeable ids of the text table (Emu3.5 starts from a
Qwen3 model, paper section 3.2). Beyond those ids the vocabularies differ: Qwen3 continues with its
own chat tokens and padding rows, Emu3.5 with 211 specials and the visual codes. So the first
151,643 rows are taken over and the others drawn anew. The next three ids, 151,643 to 151,645, are
the same strings in both (``<|endoftext|>``, ``<|im_start|>``, ``<|im_end|>``) and are redrawn all
the same, by choice: the first is PAD here, and the template of Emu3.5 uses neither of the others.

A new row starts from the mean of the text rows plus noise. Rows of noise alone would give every new
id a logit near zero, which is far above that of most text ids, since trained output rows push
what does not occur below zero; the first steps would then be spent on pushing 131,283 ids down.
With the mean, a new id is as likely at first as text ids are on average.

Rows are drawn in blocks, like the initial weights of :mod:`emu35.model.init`, so that every layout
gets the same ones and a rank draws only those that it holds. For the mean the ranks share the
reading: each sums some blocks of text rows, and all add the sums in the same order.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from emu35.checkpoint.agree import gather, on_all_ranks
from emu35.checkpoint.hf import PartReader
from emu35.config.stage import NewRows, NewRowsConfig
from emu35.model.init import random_blocks
from emu35.parallel.collectives import rank, world_size
from emu35.tokens.vocabulary import Vocabulary

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

_SUMMED_ROWS = 2048


@dataclass(kw_only=True, slots=True, frozen=True)
class Extended(Mapping[str, torch.Tensor]):
    """Qwen3's tensors with the embedding and the output layer fitted to another vocabulary, read
    and drawn part by part (a :class:`~emu35.checkpoint.hf.PartReader`).

    A new row is ``means[name]`` (zero where there is none) plus N(0, ``std``), in fp32, the same on
    every machine; the PAD row of the embedding is zero. Tied weights become two matrices that start
    from the same text rows and have new rows of their own.
    """

    base: PartReader
    names: frozenset[str]
    vocabulary: Vocabulary
    tied: bool
    std: float
    seed: int
    means: Mapping[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.part(name, dim=0, start=0, stop=self.shape(name)[0])

    def __iter__(self) -> Iterator[str]:
        yield from sorted(self.names | {OUTPUT})

    def __len__(self) -> int:
        return len(self.names | {OUTPUT})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, after the extension."""
        if name in (EMBEDDING, OUTPUT):
            return (self.vocabulary.size, *self.base.shape(self._source(name))[1:])
        return self.base.shape(name)

    def part(self, name: str, *, dim: int, start: int, stop: int) -> torch.Tensor:
        """Indices [start, stop) of dimension ``dim`` of a tensor; the two matrices of the
        vocabulary can be read by rows only."""
        if name not in (EMBEDDING, OUTPUT):
            return self.base.part(name, dim=dim, start=start, stop=stop)
        assert dim == 0, name
        taken = self.vocabulary.n_text
        parts: list[torch.Tensor] = []
        if start < taken:
            source = self._source(name)
            parts.append(self.base.part(source, dim=0, start=start, stop=min(stop, taken)))
        if stop > taken:
            parts.append(self._new_rows(name, start=max(start, taken), stop=stop))
        return parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts])

    def _source(self, name: str) -> str:
        return EMBEDDING if self.tied else name

    def _new_rows(self, name: str, *, start: int, stop: int) -> torch.Tensor:
        columns = self.shape(name)[1]
        rows = torch.empty(stop - start, columns)
        for first, block in random_blocks(
            start, stop - start, columns=columns, name=name, seed=self.seed
        ):
            low, high = max(start, first), min(stop, first + len(block))
            rows[low - start : high - start] = block[low - first : high - first] * self.std
        if (mean := self.means.get(self._source(name))) is not None:
            rows += mean
        if name == EMBEDDING and start <= self.vocabulary.pad < stop:
            rows[self.vocabulary.pad - start] = 0
        return rows


def extend(
    base: PartReader,
    *,
    names: frozenset[str],
    vocabulary: Vocabulary,
    tied: bool,
    new_rows: NewRowsConfig,
    seed: int,
) -> Extended:
    """Fit Qwen3's tensors, called ``names``, to ``vocabulary``; their matrices have at least its
    text rows. Collective.

    Raises:
        CheckpointError: the text rows cannot be read.
    """
    matrices = (EMBEDDING,) if tied else (EMBEDDING, OUTPUT)
    means: Mapping[str, torch.Tensor] = {}
    if new_rows.policy is NewRows.mean:
        means = row_means(base, names=matrices, rows=vocabulary.n_text)
    return Extended(
        base=base,
        names=names,
        vocabulary=vocabulary,
        tied=tied,
        std=new_rows.std,
        seed=seed,
        means=means,
    )


def row_means(base: PartReader, *, names: tuple[str, ...], rows: int) -> dict[str, torch.Tensor]:
    """Mean of the first ``rows`` rows of matrices, fp32 [columns] each, the same on every rank.
    Summed in fp64, a few rows at a time, each row read by one rank. Collective.

    Raises:
        CheckpointError: a matrix cannot be read.
    """
    blocks = [(name, start) for name in names for start in range(0, rows, _SUMMED_ROWS)]
    own = blocks[rank() :: world_size()]

    def sums() -> torch.Tensor:
        found = torch.empty(len(own), columns, dtype=torch.float64)
        # One buffer for all blocks: freshly allocated ones are scattered over the heap, and what
        # they leave there adds up to the size of the matrix.
        buffer = torch.empty(_SUMMED_ROWS, columns, dtype=torch.float64)
        for index, (name, start) in enumerate(own):
            stop = min(start + _SUMMED_ROWS, rows)
            part = buffer[: stop - start].copy_(base.part(name, dim=0, start=start, stop=stop))
            torch.sum(part, dim=0, out=found[index])
        return found

    columns = base.shape(names[0])[1]
    every = gather(on_all_ranks(sums, blame=lambda why: f"cannot average the text rows: {why}"))
    totals = {name: torch.zeros(columns, dtype=torch.float64) for name in names}
    for index, (name, _) in enumerate(blocks):
        totals[name] += every[index % world_size()][index // world_size()]
    return {name: total.div(rows).float() for name, total in totals.items()}
