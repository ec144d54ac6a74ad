"""Documents without their prompt, for guidance: what the engine's unconditional stream sees."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from emu35.data.batch import Batch
from emu35.dida.layout import find_pictures
from emu35.parallel.noise import seed_for, uniform
from emu35.tokens.document import Image, Part, Special, Text
from emu35.tokens.serialize import join_parts, modality_of, split_parts
from emu35.tokens.template import Task, question_parts
from emu35.tokens.text import TextTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptDrop:
    """Replaces a ``share`` of the documents that show a picture in an answer, or without turns
    anywhere, by their unconditional form; which ones is a function of ``seed``, the number of the
    row and the document's place in it. The columns that this frees are padding. Pieces of
    documents that were cut stay as they are."""

    tokenizer: TextTokenizer
    share: float
    seed: int

    def __call__(self, batch: Batch) -> Batch:
        """A batch with some documents shortened; one that would get longer stays as it is."""
        if self.share == 0:
            return batch
        changed = batch.copy()
        for row, sample in enumerate(batch.sample_ids):
            for begin, end in self._drawn(batch, row=row, sample=sample):
                self._shorten(changed, row=row, begin=begin, end=end)
        return changed

    def _drawn(self, batch: Batch, *, row: int, sample: int) -> list[tuple[int, int]]:
        """First column and the one behind the last of each document that loses its prompt."""
        start_S, width = batch.document_start[row], batch.tokens.shape[1]
        begins, counts = start_S[start_S < width].unique_consecutive(return_counts=True)
        if not len(begins):
            return []
        noise = uniform(
            torch.tensor([seed_for("dida/prompts", seed=self.seed)]),
            positions_N=torch.tensor([sample]),
            ids_NM=begins[None],
        )
        drawn = (noise[0] < self.share).tolist()
        spans = zip(begins.tolist(), counts.tolist(), strict=True)
        return [
            (begin, begin + count)
            for (begin, count), lost in zip(spans, drawn, strict=True)
            if lost and self._shows(batch.tokens[row, begin : begin + count])
        ]

    def _shows(self, tokens_S: torch.Tensor) -> bool:
        """Whether a document is whole and shows a picture that may be asked for."""
        vocabulary = self.tokenizer.vocabulary
        if tokens_S[0] != vocabulary.bos or tokens_S[-1] != vocabulary.eos:
            return False
        turns = bool((tokens_S == vocabulary.bss).any())
        start_S = torch.zeros_like(tokens_S)
        return any(find_pictures(tokens_S, start_S, vocabulary, answers_only=turns))

    def _shorten(self, batch: Batch, *, row: int, begin: int, end: int) -> None:
        ids = unconditional_ids(batch.tokens[row, begin:end].tolist(), self.tokenizer)
        count, vocabulary = len(ids), self.tokenizer.vocabulary
        if count > end - begin:
            return
        modality_S = torch.from_numpy(modality_of(np.array(ids), vocabulary=vocabulary))
        ids_S, last, stop = torch.tensor(ids), begin + count - 1, begin + count
        source = int(batch.label_source[row, begin])
        batch.erase(row, slice(begin, end), pad=vocabulary.pad)
        batch.tokens[row, begin:stop] = ids_S
        batch.labels[row, begin:last] = ids_S[1:]
        batch.label_modality[row, begin:last] = modality_S[1:]
        batch.label_valid[row, begin:last] = True
        batch.label_source[row, begin:last] = source
        batch.positions[row, begin:stop] = torch.arange(count)
        batch.document_start[row, begin:stop] = begin


def unconditional_ids(ids: Iterable[int], tokenizer: TextTokenizer) -> list[int]:
    """A document's ids as the unconditional stream has them: of questions their pictures, in the
    general prompt; of answers their pictures alone. A document without turns keeps its pictures.
    BOS, ESS and EOS stay.

    Equal to :func:`~emu35.tokens.template.build_prompt`'s ``unconditional`` up to the last answer.
    """
    vocabulary = tokenizer.vocabulary
    parts = split_parts(ids, tokenizer)
    name = vocabulary.special_string
    bss, ends = name(vocabulary.bss), {name(vocabulary.ess), name(vocabulary.eos)}
    if Special(bss) not in parts:
        kept = {name(vocabulary.bos), name(vocabulary.eos)}
        return join_parts([part for part in parts if _stays(part, kept)], tokenizer)
    made: list[Part] = []
    asked: list[Image] = []
    turns, answering = 0, False
    for part in parts:
        if part == Special(bss) and not answering:
            made += question_parts(Task.chat, "", images=asked, later=turns > 0)
            asked, turns, answering = [], turns + 1, True
        elif isinstance(part, Image):
            (made if answering else asked).append(part)
        elif isinstance(part, Special) and (
            part.token in ends or part.token == name(vocabulary.bos)
        ):
            made.append(part)
            answering = answering and part.token not in ends
    return join_parts([part for part in made if part != Text("")], tokenizer)


def _stays(part: Part, specials: set[str]) -> bool:
    return isinstance(part, Image) or (isinstance(part, Special) and part.token in specials)
