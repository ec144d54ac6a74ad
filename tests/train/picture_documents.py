"""Drawn documents with pictures, for layouts that train on noisy copies of them."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from emu35.data.batch import Batch
from emu35.parallel.mesh import Mesh
from emu35.tokens.serialize import Modality
from emu35.tokens.vocabulary import Vocabulary

CODES = 25
"""No number of ranks divides it."""
VOCABULARY = Vocabulary(n_text=256, codebook_size=CODES)
ROWS = 8
LENGTH, ROOM = 48, 32

Document = tuple[torch.Tensor, torch.Tensor]
"""Token ids and the modality of each."""


def draw_document(generator: torch.Generator) -> Document:
    """Words, a picture of one to three rows, and words; at most 23 tokens."""

    def below(bound: int) -> int:
        return int(torch.randint(0, bound, (1,), generator=generator))

    height, width = 1 + below(3), 1 + below(3)
    tokens = [(VOCABULARY.bos, Modality.CONTROL)]
    tokens += [(97 + below(20), Modality.TEXT) for _ in range(1 + below(3))]
    tokens += [(id, Modality.LAYOUT) for id in (VOCABULARY.boi, 48 + height, 42, 48 + width)]
    tokens.append((VOCABULARY.img, Modality.LAYOUT))
    for row in range(height):
        tokens += [(VOCABULARY.visual(below(CODES)), Modality.VISUAL) for _ in range(width)]
        tokens += [(VOCABULARY.eol, Modality.LAYOUT)] * (row < height - 1)
    tokens.append((VOCABULARY.eoi, Modality.LAYOUT))
    tokens += [(97 + below(20), Modality.TEXT) for _ in range(below(2))]
    tokens.append((VOCABULARY.eos, Modality.CONTROL))
    ids, codes = zip(*tokens, strict=True)
    return torch.tensor(ids), torch.tensor([int(code) for code in codes], dtype=torch.uint8)


class PictureDocuments:
    """Global batches of two documents a row, drawn from the step number; ``lay_out`` makes a batch
    of rows of documents, ``prepare`` is what the stage does to it."""

    def __init__(
        self,
        *,
        mesh: Mesh,
        micro_batch_size: int,
        lay_out: Callable[[list[list[Document]]], Batch],
        prepare: Callable[[Batch], Batch],
    ) -> None:
        self.mesh, self.size = mesh, micro_batch_size
        self.lay_out, self.prepare = lay_out, prepare
        self.step = 0

    def next_step(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(self.step)
        rows = [[draw_document(generator) for _ in range(2)] for _ in range(ROWS)]
        own = ROWS // self.mesh.dp_size
        first = self.mesh.dp_rank * own
        batches: list[Batch] = []
        for begin in range(first, first + own, self.size):
            batch = self.lay_out(rows[begin : begin + self.size])
            numbers = [self.step * ROWS + begin + row for row in range(self.size)]
            batches.append(self.prepare(replace(batch, sample_ids=numbers)))
        self.step += 1
        return batches

    def counts(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class HeldOutPictures:
    """Three validation batches, alike in every layout."""

    def __init__(self, documents: PictureDocuments) -> None:
        documents.step = 1000
        self.batches = [documents.next_step()[0] for _ in range(3)]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)
