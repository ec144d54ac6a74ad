"""What a noisy copy must not see, and what must not see it."""

from dataclasses import replace

import pytest
import torch
from dida_rows import CODES, VOCABULARY, picture, row
from tiny_models import tiny_lm

from emu35.config import AttentionBackend, LoRAConfig
from emu35.data.batch import Batch
from emu35.dida.layout import NoisyCopies, find_pictures
from emu35.model.build import build_model
from emu35.model.context import AttentionContext
from emu35.model.init import initialize
from emu35.model.logits import vocabulary_logits
from emu35.model.lora import adapted_linears, train_adapters
from emu35.model.mask import AttentionMask
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import single_process_mesh

COLUMNS, ROOM = 96, 64
BACKENDS = [AttentionBackend.segment, AttentionBackend.dense]


def model_with(backend: AttentionBackend) -> Emu35Model:
    single_process_mesh()
    config = tiny_lm(attention_backend=backend)
    model = build_model(config, vocabulary_size=VOCABULARY.size)
    initialize(model, seed=5, pad_id=VOCABULARY.pad)
    return model.eval()


def batch_with_copies() -> Batch:
    """Two documents, the first with two pictures and words between them."""
    first = ["ab", picture(3, 4, seed=1), "cd", picture(2, 3, seed=2), "e"]
    batch = row([first, ["f", picture(3, 3, seed=3)]], columns=COLUMNS)
    return NoisyCopies(vocabulary=VOCABULARY, room=ROOM)(batch)


def logits(model: Emu35Model, batch: Batch, *, adapted: bool = False) -> torch.Tensor:
    assert batch.intervals is not None
    assert batch.noisy is not None
    context = AttentionContext(
        positions_BS=batch.positions,
        mask=AttentionMask.from_intervals(batch.intervals),
        adapted_BS=batch.noisy >= 0 if adapted else None,
    )
    with torch.no_grad():
        hidden_SBH = model(batch.tokens, context=context)
    return vocabulary_logits(model, hidden_NH=hidden_SBH[:, 0])


def changed(batch: Batch, *columns: int) -> Batch:
    """With other codes at ``columns``."""
    tokens_BS = batch.tokens.clone()
    for column in columns:
        code = VOCABULARY.code(int(tokens_BS[0, column]))
        tokens_BS[0, column] = VOCABULARY.visual((code + 1) % CODES)
    return replace(batch, tokens=tokens_BS)


def copy_rows(batch: Batch, number: int) -> torch.Tensor:
    assert batch.noisy is not None
    return (batch.noisy[0] == number).nonzero().squeeze(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_code_of_a_clean_picture_moves_its_copy_or_an_earlier_one(
    backend: AttentionBackend,
) -> None:
    model, batch = model_with(backend), batch_with_copies()
    before = logits(model, batch)
    pictures = list(find_pictures(batch.tokens[0], batch.document_start[0], VOCABULARY))
    assert len(pictures) == 3
    for number, found in enumerate(pictures):
        codes = [
            column
            for column in range(found.img, found.eoi)
            if VOCABULARY.is_visual(int(batch.tokens[0, column]))
        ]
        for column in codes:
            after = logits(model, changed(batch, column))
            for other in range(number + 1):
                rows = copy_rows(batch, other)
                assert torch.equal(after[rows], before[rows]), (column, other)
        if number == 0:
            later = copy_rows(batch, 1)
            after = logits(model, changed(batch, *codes))
            assert not torch.equal(after[later], before[later]), "the prefix is seen"
            alien = copy_rows(batch, 2)
            assert torch.equal(after[alien], before[alien]), "another document"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_moves_itself_and_nothing_else(backend: AttentionBackend) -> None:
    model, batch = model_with(backend), batch_with_copies()
    before = logits(model, batch)
    for number in range(3):
        rows = copy_rows(batch, number)
        for column in rows[1:].tolist():
            if not VOCABULARY.is_visual(int(batch.tokens[0, column])):
                continue
            after = logits(model, changed(batch, column))
            others = torch.ones(COLUMNS + ROOM, dtype=torch.bool)
            others[rows] = False
            assert torch.equal(after[others], before[others])
            assert (after[rows] != before[rows]).any(1).all(), "every row sees the whole copy"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_clean_row_is_bit_for_bit_that_without_copies(backend: AttentionBackend) -> None:
    """In a row as long: what a matrix product rounds depends on its shape."""
    model, batch = model_with(backend), batch_with_copies()
    plain = row([], columns=ROOM)
    assert batch.noisy is not None
    assert batch.intervals is not None
    copies = batch.noisy[0] >= 0
    intervals = batch.intervals.clone()
    intervals[0, copies] = torch.tensor([0, 0, 0, 0])
    bare = replace(
        batch,
        tokens=torch.where(batch.noisy >= 0, plain.tokens[0, 0], batch.tokens),
        intervals=intervals,
    )
    assert torch.equal(logits(model, bare)[:COLUMNS], logits(model, batch)[:COLUMNS])


def test_adapters_of_copies_leave_the_clean_rows_bit_for_bit_as_they_were() -> None:
    model, batch = model_with(AttentionBackend.segment), batch_with_copies()
    before = logits(model, batch)
    train_adapters(model, config=LoRAConfig(rank=4, alpha=8.0), seed=1, noisy_only=True)
    for linear in adapted_linears(model).values():
        assert linear.adapter is not None
        torch.nn.init.normal_(linear.adapter.b, std=0.1)
    after = logits(model, batch, adapted=True)
    assert torch.equal(after[:COLUMNS], before[:COLUMNS])
    assert batch.noisy is not None
    rows = (batch.noisy[0] >= 0).nonzero().squeeze(1)
    assert (after[rows] != before[rows]).any(1).all()
