"""Packed rows of short documents with pictures, laid out as the loader lays them out."""

from collections.abc import Sequence

import numpy as np
import torch

from emu35.config import TokenizerConfig
from emu35.data.batch import Batch
from emu35.tokens.document import Document, Image, Part, Text
from emu35.tokens.serialize import serialize
from emu35.tokens.text import build_text_tokenizer

CODES = 24
TOKENIZER = build_text_tokenizer(TokenizerConfig(codebook_size=CODES))
VOCABULARY = TOKENIZER.vocabulary


def picture(height: int, width: int, *, seed: int = 0) -> Image:
    codes_HW = np.random.default_rng(seed).integers(0, CODES, (height, width))
    return Image(codes_HW)


def row(documents: Sequence[Sequence[str | Part]], *, columns: int, sample: int = 0) -> Batch:
    """One row of documents of texts, pictures and specials, padded to ``columns``."""
    pad = VOCABULARY.pad
    tokens_S = torch.full((columns,), pad)
    labels_S = tokens_S.clone()
    modality_S = torch.zeros(columns, dtype=torch.uint8)
    valid_S = torch.zeros(columns, dtype=torch.bool)
    positions_S, start_S = torch.zeros(columns, dtype=torch.int64), torch.full((columns,), columns)
    first = 0
    for parts in documents:
        made: list[Part] = [Text(part) if isinstance(part, str) else part for part in parts]
        found = serialize(Document(made), TOKENIZER)
        ids = torch.from_numpy(found.tokens.astype(np.int64))
        codes = torch.from_numpy(found.modality)
        end = first + len(ids)
        assert end <= columns
        tokens_S[first:end], positions_S[first:end] = ids, torch.arange(len(ids))
        labels_S[first : end - 1], modality_S[first : end - 1] = ids[1:], codes[1:]
        valid_S[first : end - 1] = True
        start_S[first:end] = first
        first = end
    return Batch(
        tokens=tokens_S[None],
        labels=labels_S[None],
        label_modality=modality_S[None],
        label_valid=valid_S[None],
        label_source=torch.zeros(1, columns, dtype=torch.int16),
        positions=positions_S[None],
        document_start=start_S[None],
        sample_ids=[sample],
    )
