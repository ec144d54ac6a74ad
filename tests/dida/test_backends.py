"""Rows with noisy copies come out the same from every backend that knows interval masks."""

from typing import Any

import pytest
import torch
from copies_batch import COLUMNS, ROOM, copies_batch, two_rows
from dida_rows import VOCABULARY, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_lm
from torch.nn.attention.flex_attention import create_block_mask

from emu35.config import AttentionBackend
from emu35.data.batch import Batch
from emu35.model.attention import flex
from emu35.model.build import build_model
from emu35.model.context import AttentionContext
from emu35.model.init import initialize
from emu35.model.mask import AttentionMask
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import single_process_mesh

LAYERS = 3
CPU = torch.device("cpu")


def model_with(backend: AttentionBackend) -> Emu35Model:
    single_process_mesh()
    config = tiny_lm(attention_backend=backend, num_layers=LAYERS, init_std=0.2)
    model = build_model(config, vocabulary_size=VOCABULARY.size)
    initialize(model, seed=5, pad_id=VOCABULARY.pad)
    return model.eval()


def context_of(batch: Batch) -> AttentionContext:
    assert batch.intervals is not None
    return AttentionContext(
        positions_BS=batch.positions, mask=AttentionMask.from_intervals(batch.intervals)
    )


def hidden(model: Emu35Model, batch: Batch) -> torch.Tensor:
    """Final states [B, S, H]."""
    return model(batch.tokens, context=context_of(batch)).transpose(0, 1)


def test_the_rows_have_all_that_a_mask_can_have() -> None:
    batch = two_rows()
    assert batch.noisy is not None
    counted = [int(noisy_S.max()) + 1 for noisy_S in batch.noisy]
    copied = [len(noisy_S[noisy_S >= 0].unique()) for noisy_S in batch.noisy]
    assert counted == [3, 1]
    assert copied == [3, 1]
    empty = context_of(batch).mask.visible_keys() == 0  # type: ignore[union-attr]
    assert empty[:, :COLUMNS].any(1).all()
    assert empty[:, COLUMNS:].any(1).all()
    assert batch.tokens.shape == (2, COLUMNS + ROOM)


@pytest.mark.slow
def test_flex_and_segment_equal_dense_forward() -> None:
    batch = two_rows()
    found = {}
    for backend in (AttentionBackend.dense, AttentionBackend.segment, AttentionBackend.flex):
        with torch.no_grad():
            found[backend] = hidden(model_with(backend), batch)
    oracle = found.pop(AttentionBackend.dense)
    assert oracle.std() > 0.5
    for backend, states in found.items():
        torch.testing.assert_close(states, oracle, rtol=1e-4, atol=1e-4, msg=backend.value)


def test_segment_equals_dense_backward() -> None:
    batch = two_rows()
    gradients = []
    for backend in (AttentionBackend.dense, AttentionBackend.segment):
        model = model_with(backend)
        states = hidden(model, batch)
        generator = torch.Generator().manual_seed(1)
        (states * torch.randn(states.shape, generator=generator)).sum().backward()
        gradients.append(
            {
                name: weight.grad
                for name, weight in model.named_parameters()
                if weight.grad is not None
            }
        )
    oracle, found = gradients
    assert oracle.keys() == found.keys()
    for name, gradient in oracle.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * scale, msg=name)


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
documents = st.lists(
    st.lists(st.one_of(st.text("ab ", min_size=1, max_size=30), sizes), min_size=1, max_size=2),
    min_size=1,
    max_size=2,
)


@settings(max_examples=15, deadline=None)
@given(st.lists(documents, min_size=1, max_size=2), st.integers(90, 250))
def test_the_block_mask_is_the_one_that_torch_finds_in_the_whole_matrix(
    drawn: list[list[list[str | tuple[int, int]]]], room: int
) -> None:
    batch = copies_batch(
        *[
            [
                [p if isinstance(p, str) else picture(*p, seed=at) for at, p in enumerate(parts)]
                for parts in documents
            ]
            for documents in drawn
        ],
        columns=420,
        room=room,
    )
    mask = context_of(batch).mask
    assert mask is not None
    rows, length = batch.tokens.shape
    padded = flex.bucket(length)
    visible_BSK = torch.zeros(rows, padded, padded, dtype=torch.bool)
    visible_BSK[:, :length, :length] = mask.dense(length)

    def sees(b: Any, h: Any, query: Any, key: Any) -> Any:
        del h
        return visible_BSK[b, query, key]

    theirs = create_block_mask(sees, B=rows, H=1, Q_LEN=padded, KV_LEN=padded, device="cpu")
    ours = flex.block_mask(mask, num_keys=length, device=CPU)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for counts, indices in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        listed = torch.arange(padded // 128) < getattr(theirs, counts)[..., None]
        ours_listed, theirs_listed = (
            torch.where(listed, getattr(each, indices), -1) for each in (ours, theirs)
        )
        assert torch.equal(ours_listed, theirs_listed), indices


@pytest.mark.slow
def test_the_block_mask_is_built_once_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers share it; the next micro-batch has its own."""
    built: list[int] = []
    original = flex.block_mask

    def counting(mask: AttentionMask, **arguments: Any) -> Any:
        built.append(int(mask.visible_keys().sum()))
        return original(mask, **arguments)

    monkeypatch.setattr(flex, "block_mask", counting)
    model = model_with(AttentionBackend.flex)
    batches = [two_rows(), copies_batch([["b", picture(3, 3)]], [["c"]])]
    with torch.no_grad():
        for count, batch in enumerate(batches, start=1):
            hidden(model, batch)
            assert len(built) == count
    assert built[0] != built[1]
