"""Every backend against the dense oracle, and the oracle against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_lm

from emu35.config import AttentionBackend
from emu35.model.attention import dense, segment
from emu35.model.build import build_model
from emu35.model.cache import CachedForward, KVCache, Span
from emu35.model.context import AttentionContext
from emu35.model.init import initialize
from emu35.model.mask import AttentionMask
from emu35.model.transformer import Emu35Model
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


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_cached_forwards_in_any_pieces_equal_the_full_forward(data: st.DataObject) -> None:
    """Three sequences of a cache, fed in any portions and any company, against each on its own."""
    model = tiny_model().eval()
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=3))
    tokens = [
        torch.randint(1, 101, (length,), generator=torch.Generator().manual_seed(n))
        for n, length in enumerate(lengths)
    ]
    cache = KVCache(num_layers=2, slots=32, num_kv_heads=2, head_dim=16)
    fed, hidden = [0, 0, 0], [[] for _ in tokens]
    while pending := [n for n in range(3) if fed[n] < lengths[n]]:
        chosen = data.draw(st.lists(st.sampled_from(pending), unique=True, min_size=1))
        counts = [data.draw(st.integers(1, lengths[n] - fed[n])) for n in chosen]
        spans = [
            Span(start=10 * n, length=fed[n], count=count)
            for n, count in zip(chosen, counts, strict=True)
        ]
        pieces = [tokens[n][fed[n] : fed[n] + c] for n, c in zip(chosen, counts, strict=True)]
        places = [torch.arange(fed[n], fed[n] + c) for n, c in zip(chosen, counts, strict=True)]
        context = AttentionContext(
            positions_BS=torch.cat(places)[None], cache=CachedForward(cache, spans=spans)
        )
        with torch.no_grad():
            states = model(torch.cat(pieces)[None], context=context)[:, 0].split(counts)
        for n, count, state in zip(chosen, counts, states, strict=True):
            hidden[n].append(state)
            fed[n] += count
    for tokens_S, states in zip(tokens, hidden, strict=True):
        torch.testing.assert_close(torch.cat(states), alone(model, tokens_S), rtol=1e-5, atol=1e-5)


def alone(model: Emu35Model, tokens_S: torch.Tensor, *, full_from: int | None = None):
    """Hidden states [S, H] without a cache; tokens from ``full_from`` on see each other."""
    length = len(tokens_S)
    rows_1S = torch.arange(length)[None]
    zeros_1S = torch.zeros_like(rows_1S)
    span_end = None
    if full_from is not None:
        span_end = torch.where(rows_1S >= full_from, length, 0)
    mask = AttentionMask.causal(zeros_1S, span_end_BS=span_end)
    with torch.no_grad():
        context = AttentionContext(positions_BS=rows_1S, mask=mask)
        return model(tokens_S[None], context=context)[:, 0]


def test_a_canvas_sees_itself_whole_and_leaves_the_prefix_as_it_was() -> None:
    model = tiny_model().eval()
    prefix, canvas = torch.randint(1, 101, (12,)).split([5, 7])
    cache = KVCache(num_layers=2, slots=16, num_kv_heads=2, head_dim=16)

    def forward(tokens_S: torch.Tensor, span: Span) -> torch.Tensor:
        places = torch.arange(span.length, span.length + span.count)[None]
        context = AttentionContext(positions_BS=places, cache=CachedForward(cache, spans=[span]))
        with torch.no_grad():
            return model(tokens_S[None], context=context)[:, 0]

    forward(prefix, Span(start=2, length=0, count=5))
    before = cache.keys_NGLD[:, :, 2:7].clone()
    for _ in range(2):
        canvas = canvas.flip(0)
        found = forward(canvas, Span(start=2, length=5, count=7, causal=False))
        expected = alone(model, torch.cat([prefix, canvas]), full_from=5)[5:]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(before, cache.keys_NGLD[:, :, 2:7])
    causal = forward(canvas, Span(start=2, length=5, count=7))
    expected = alone(model, torch.cat([prefix, canvas]))[5:]
    torch.testing.assert_close(causal, expected, rtol=1e-5, atol=1e-5)


def test_slots_move_over_themselves() -> None:
    cache = KVCache(num_layers=2, slots=10, num_kv_heads=1, head_dim=2)
    cache.keys_NGLD.copy_(torch.arange(10.0)[:, None].expand(2, 1, 10, 2))
    cache.move(source=2, target=4, count=5)
    assert cache.keys_NGLD[1, 0, :, 0].tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 6, 9]
    cache.move(source=4, target=1, count=5)
    assert cache.keys_NGLD[0, 0, :, 1].tolist() == [0, 2, 3, 4, 5, 6, 4, 5, 6, 9]
