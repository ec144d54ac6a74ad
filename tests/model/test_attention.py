"""Every backend against the dense oracle, and the oracle against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_lm

from emu35.config import AttentionBackend
from emu35.model.attention import dense, segment
from emu35.model.build import build_model
from emu35.model.cache import KVCache
from emu35.model.context import AttentionContext
from emu35.model.init import initialize
from emu35.model.mask import AttentionMask
from emu35.parallel.mesh import single_process_mesh


def tiny_model(vocabulary_size: int = 101, **changes: object):
    single_process_mesh()
    model = build_model(tiny_lm(**changes), vocabulary_size=vocabulary_size)
    initialize(model, seed=3, pad_id=0)
    return model


@st.composite
def masks(draw: st.DrawFn) -> AttentionMask:
    """Packed documents, padding, bidirectional spans and noisy copies of a prefix, mixed."""
    length = draw(st.integers(4, 24))
    rows = []
    for _ in range(draw(st.integers(1, 2))):
        intervals: list[tuple[int, int, int, int]] = []
        while len(intervals) < length:
            start = len(intervals)
            count = draw(st.integers(1, length - start))
            kind = draw(st.sampled_from(["causal", "full", "empty", "copy"]))
            end = start + count
            if kind == "causal":
                intervals += [(start, row + 1, 0, 0) for row in range(start, end)]
            elif kind == "full":
                intervals += [(start, end, 0, 0)] * count
            elif kind == "empty":
                intervals += [(length, 0, 0, 0)] * count
            else:
                prefix = draw(st.integers(0, start))
                first = draw(st.integers(0, prefix))
                intervals += [(first, prefix, start, end)] * count
        rows.append(intervals)
    return AttentionMask.from_intervals(torch.tensor(rows))


@settings(max_examples=60, deadline=None)
@given(masks(), st.integers(0, 2**31))
def test_segment_equals_dense_forward_and_backward(mask: AttentionMask, seed: int) -> None:
    batch, length = mask.start1_BS.shape
    generator = torch.Generator().manual_seed(seed)
    results = []
    draws = [
        torch.randn(batch, heads, length, 8, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2, 4)
    ]
    for attend in (segment.attend, dense.attend):
        query, key, value = (tensor.clone().requires_grad_() for tensor in draws[:3])
        context = AttentionContext(mask=mask)
        output = attend(query, key_BGKD=key, value_BGKD=value, context=context)
        if output.requires_grad:  # a mask of empty rows alone gives a constant
            output.backward(draws[3])
        gradients = (tensor.grad for tensor in (query, key, value))
        results.append(
            (output, *(torch.zeros(1, dtype=torch.float64) if g is None else g for g in gradients))
        )
    for ours, oracle in zip(*results, strict=True):
        torch.testing.assert_close(ours.expand_as(oracle), oracle, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(masks())
def test_segments_cover_every_row_once_and_hold_exactly_the_visible_keys(
    mask: AttentionMask,
) -> None:
    length = mask.start1_BS.shape[1]
    visible_BSK = mask.dense(length)
    for b, segments in enumerate(segment.find_segments(mask)):
        rows = [row for part in segments for row in range(part.row, part.row + part.length)]
        assert rows == list(range(length))
        for part in segments:
            for offset in range(part.length):
                keys = torch.zeros(length, dtype=torch.bool)
                for start, end in part.keys:
                    grown = start + part.first_count + offset
                    keys[start : end if part.kind is not segment.SegmentKind.causal else grown] = 1
                assert torch.equal(keys, visible_BSK[b, part.row + offset])


def test_dense_output_is_softmax_over_visible_keys_and_zero_where_there_are_none() -> None:
    mask = AttentionMask.causal(torch.tensor([[0, 0, 2, 4]]))
    query, key, value = (torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(3))
    output = dense.attend(
        query, key_BGKD=key, value_BGKD=value, context=AttentionContext(mask=mask)
    )
    weights = (query[0, 0, 1] @ key[0, 0, :2].T / 8**0.5).softmax(-1)
    torch.testing.assert_close(output[0, 0, 1], weights @ value[0, 0, :2])
    torch.testing.assert_close(output[0, 0, 2], value[0, 0, 2])
    assert torch.equal(output[0, 0, 3], torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize(
    "backend", [AttentionBackend.segment, AttentionBackend.dense, AttentionBackend.flex]
)
def test_packed_documents_do_not_see_each_other(backend: AttentionBackend) -> None:
    model = tiny_model(attention_backend=backend).eval()
    start_BS = torch.tensor([[0] * 6 + [6] * 7 + [16] * 3])
    positions_BS = (torch.arange(16) - start_BS).clamp(min=0)
    tokens_BS = torch.randint(1, 101, (1, 16), generator=torch.Generator().manual_seed(0))

    def hidden(tokens: torch.Tensor) -> torch.Tensor:
        context = AttentionContext(positions_BS=positions_BS, mask=AttentionMask.causal(start_BS))
        with torch.no_grad():
            return model(tokens, context=context)[:, 0]

    before = hidden(tokens_BS)
    changed = tokens_BS.clone()
    changed[0, :6] = 7
    after = hidden(changed)
    assert torch.equal(before[6:13], after[6:13])
    assert not torch.equal(before[:6], after[:6])
    # A document packed behind another one computes what it computes alone.
    alone = AttentionContext(
        positions_BS=torch.arange(7)[None], mask=AttentionMask.causal(torch.zeros(1, 7).long())
    )
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BS[:, 6:13], context=alone)[:, 0], before[6:13])


def test_no_token_sees_the_future() -> None:
    model = tiny_model().eval()
    tokens_BS = torch.randint(1, 101, (1, 12), generator=torch.Generator().manual_seed(1))
    zeros_BS = torch.zeros(1, 12, dtype=torch.int64)

    def hidden(tokens: torch.Tensor) -> torch.Tensor:
        context = AttentionContext(
            positions_BS=torch.arange(12)[None], mask=AttentionMask.causal(zeros_BS)
        )
        with torch.no_grad():
            return model(tokens, context=context)[:, 0]

    before = hidden(tokens_BS)
    for column in range(1, 12):
        changed = tokens_BS.clone()
        changed[0, column:] = 5
        assert torch.equal(before[:column], hidden(changed)[:column])


def test_cached_decoding_of_ragged_prompts_equals_the_full_forward() -> None:
    model = tiny_model().eval()
    lengths = [5, 9]
    tokens_BS = torch.randint(1, 101, (2, 14), generator=torch.Generator().manual_seed(2))
    cache = KVCache(num_layers=2, batch_size=2, max_length=20, num_kv_heads=2, head_dim=16)

    def forward(tokens: torch.Tensor, positions: torch.Tensor, cached: KVCache | None):
        zeros = torch.zeros_like(positions)
        mask = AttentionMask(start1_BS=zeros, end1_BS=positions + 1, start2_BS=zeros, end2_BS=zeros)
        with torch.no_grad():
            return model(
                tokens, context=AttentionContext(positions_BS=positions, mask=mask, cache=cached)
            )

    prompt = forward(tokens_BS[:, :9], torch.arange(9).expand(2, 9), cache)
    cache.advance(torch.tensor(lengths))
    rows = [[prompt[i, b] for i in range(lengths[b])] for b in range(2)]
    for step in range(5):
        positions_B1 = cache.lengths_B[:, None].clone()
        hidden = forward(tokens_BS.gather(1, positions_B1), positions_B1, cache)
        cache.advance(torch.tensor([1, 1]))
        for b in range(2):
            rows[b].append(hidden[0, b])
        assert cache.lengths_B.tolist() == [lengths[0] + step + 1, lengths[1] + step + 1]
    full = forward(tokens_BS, torch.arange(14).expand(2, 14), None)
    for b in range(2):
        count = lengths[b] + 5
        torch.testing.assert_close(torch.stack(rows[b]), full[:count, b], rtol=1e-5, atol=1e-5)


def test_a_full_cache_says_so() -> None:
    cache = KVCache(num_layers=1, batch_size=1, max_length=4, num_kv_heads=1, head_dim=2)
    states = torch.zeros(5, 1, 1, 2)
    with pytest.raises(ValueError, match="4 slots, but 5 are needed"):
        cache.append(layer=0, keys_SBGD=states, values_SBGD=states)
