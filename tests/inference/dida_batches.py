"""A canvas as training lays it out: a noisy copy behind a packed row."""

from collections.abc import Sequence

import torch

from emu35.data.batch import Batch
from emu35.dida.layout import NoisyCopies
from emu35.model.context import AttentionContext
from emu35.model.logits import vocabulary_logits
from emu35.model.mask import AttentionMask
from emu35.model.transformer import Emu35Model
from emu35.tokens.text import TextTokenizer


@torch.no_grad()
def copy_logits(
    model: Emu35Model,
    *,
    prefix: Sequence[int],
    canvas: Sequence[int],
    tokenizer: TextTokenizer,
    adapted: bool | None = None,
) -> torch.Tensor:
    """Logits [L, V] of the noisy copy that shows ``canvas`` of a picture behind ``prefix``, whose
    clean codes are all 0. ``adapted``: whether adapters of noisy copies add to it, None where the
    model has none."""
    vocabulary = tokenizer.vocabulary
    clean = [id if id == vocabulary.eol else vocabulary.visual_start for id in canvas[1:]]
    ids = [*prefix, vocabulary.img, *clean, vocabulary.eoi]
    tokens_1S = torch.tensor([ids])
    batch = Batch(
        tokens=tokens_1S,
        labels=tokens_1S.roll(-1),
        label_modality=(tokens_1S.roll(-1) >= vocabulary.visual_start).to(torch.uint8),
        label_valid=torch.ones_like(tokens_1S, dtype=torch.bool),
        label_source=torch.zeros_like(tokens_1S, dtype=torch.int16),
        positions=torch.arange(len(ids))[None],
        document_start=torch.zeros_like(tokens_1S),
        sample_ids=[0],
    )
    pictures = list(prefix).count(vocabulary.img)
    room = len(ids)
    wide = NoisyCopies(vocabulary=vocabulary, room=room)(batch)
    assert wide.noisy is not None
    assert wide.intervals is not None
    rows_L = (wide.noisy[0] == pictures).nonzero().squeeze(1)
    assert len(rows_L) == len(canvas), "the picture is the last one of its row"
    tokens_BS = wide.tokens.clone()
    tokens_BS[0, rows_L] = torch.tensor(list(canvas))
    context = AttentionContext(
        positions_BS=wide.positions,
        mask=AttentionMask.from_intervals(wide.intervals),
        adapted_BS=None if adapted is None else (wide.noisy >= 0) & adapted,
    )
    hidden_SBH = model(tokens_BS, context=context)
    return vocabulary_logits(model, hidden_NH=hidden_SBH[rows_L, 0])
