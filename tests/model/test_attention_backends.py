"""What the GPU backends derive from the interval mask, and what is refused where."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from emu35.config import AttentionBackend, LMConfig, ParallelConfig, Precision
from emu35.config.parallel import CPCommType
from emu35.errors import ConfigError
from emu35.model.attention import dense, flex, varlen
from emu35.model.attention.support import MaskKind, require_support
from emu35.model.context import AttentionContext
from emu35.model.mask import AttentionMask

MODEL = LMConfig(attention_backend=AttentionBackend.flex)


@st.composite
def long_masks(draw: st.DrawFn) -> AttentionMask:
    """Packed documents, spans, noisy copies and padding over several blocks of 128."""
    length = draw(st.sampled_from([200, 384, 640]))
    intervals: list[tuple[int, int, int, int]] = []
    while len(intervals) < length:
        start = len(intervals)
        count = min(draw(st.sampled_from([1, 60, 128, 200, 256, 300])), length - start)
        kind = draw(st.sampled_from(["causal", "full", "empty", "copy", "touching"]))
        end = start + count
        if kind == "causal":
            intervals += [(start, row + 1, 0, 0) for row in range(start, end)]
        elif kind == "full":
            intervals += [(start, end, 0, 0)] * count
        elif kind == "empty":
            intervals += [(length, 0, 0, 0)] * count
        elif kind == "copy":
            prefix = draw(st.integers(0, start))
            intervals += [(draw(st.integers(0, prefix)), prefix, start, end)] * count
        else:  # two intervals that only together cover some blocks
            middle = draw(st.integers(0, end))
            intervals += [(0, middle, middle, end)] * count
    return AttentionMask.from_intervals(torch.tensor([intervals]))


@settings(max_examples=40, deadline=None)
@given(long_masks())
def test_counted_blocks_are_those_of_the_dense_matrix(mask: AttentionMask) -> None:
    length = flex.bucket(mask.start1_BS.shape[1])
    visible = np.zeros((length, length), dtype=bool)
    visible[: mask.start1_BS.shape[1]] = mask.dense(length)[0].numpy()
    blocks = visible.reshape(length // 128, 128, length // 128, 128).sum((1, 3))
    found = flex.block_mask(mask, num_keys=mask.start1_BS.shape[1], device=torch.device("cpu"))
    full = _as_matrix(found.full_kv_num_blocks, found.full_kv_indices)
    partial = _as_matrix(found.kv_num_blocks, found.kv_indices)
    assert np.array_equal(full, blocks == 128 * 128)
    assert np.array_equal(partial, (blocks > 0) & (blocks < 128 * 128))


def _as_matrix(count: torch.Tensor | None, index: torch.Tensor | None) -> np.ndarray:
    assert count is not None
    assert index is not None
    matrix = np.zeros(index.shape[2:], dtype=bool)
    for row, blocks in enumerate(index[0, 0].tolist()):
        matrix[row, blocks[: int(count[0, 0, row])]] = True
    return matrix


def test_block_mask_equals_the_one_that_torch_searches_for() -> None:
    start_BS = torch.tensor([[0] * 150 + [150] * 106, [0] * 256])
    mask = AttentionMask.causal(start_BS, span_end_BS=torch.full((2, 256), 40))
    ours = flex.block_mask(mask, num_keys=256, device=torch.device("cpu"))
    theirs = create_block_mask(ours.mask_mod, B=2, H=1, Q_LEN=256, KV_LEN=256, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@settings(max_examples=5, deadline=None)
@given(long_masks(), st.integers(0, 2**31))
def test_flex_forward_equals_dense(mask: AttentionMask, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = mask.start1_BS.shape[1]
    query, key, value = (
        torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2)
    )
    with torch.no_grad():
        ours, oracle = (
            backend.attend(
                query, key_BGKD=key, value_BGKD=value, context=AttentionContext(mask=mask)
            )
            for backend in (flex, dense)
        )
    torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 200_000))
def test_lengths_are_rounded_to_few_values_with_little_padding(length: int) -> None:
    padded = flex.bucket(length)
    assert padded % 128 == 0
    assert length <= padded < length + max(128, length / 8)


def test_few_lengths_compile_in_an_octave() -> None:
    assert len({flex.bucket(length) for length in range(16_385, 32_769)}) == 8


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.sets(st.integers(1, 23), max_size=4), min_size=1, max_size=3),
    padding=st.integers(0, 10),
)
def test_documents_given_to_flash_kernels_attend_as_the_mask_says(
    cuts: list[set[int]], padding: int
) -> None:
    start_BS = torch.zeros(len(cuts), 24, dtype=torch.int64)
    for row, places in enumerate(cuts):
        for cut in sorted(places):
            start_BS[row, cut:] = cut
    if padding:
        start_BS[-1, -padding:] = 24
    mask = AttentionMask.causal(start_BS)
    documents = varlen.find_documents(mask)
    visible = torch.zeros(start_BS.numel(), start_BS.numel(), dtype=torch.bool)
    ends = documents.ends_N.tolist()
    for first, end in pairwise(ends):
        visible[first:end, first:end] = torch.ones(end - first, end - first).tril().bool()
    if documents.empty_T is not None:
        visible[documents.empty_T] = False
    whole = torch.block_diag(*mask.dense(24).int()).bool()
    assert torch.equal(visible, whole)
    assert documents.longest == max(np.diff(ends))


def test_flash_kernels_refuse_what_is_not_plain_causal() -> None:
    mask = AttentionMask.causal(torch.zeros(1, 8).long(), span_end_BS=torch.full((1, 8), 4))
    with pytest.raises(ValueError, match="not plain causal"):
        varlen.find_documents(mask)


def test_a_span_sees_itself_whole_and_the_rest_stays_causal() -> None:
    start_BS, span_end_BS = torch.tensor([[0, 0, 0, 0, 4, 4, 9, 9, 9]]), torch.zeros(1, 9).long()
    span_end_BS[0, 1:3] = 3
    span_end_BS[0, 7] = 9  # padding stays empty
    visible = AttentionMask.causal(start_BS, span_end_BS=span_end_BS).dense(9)[0].sum(1).tolist()
    assert visible == [1, 3, 3, 4, 1, 2, 0, 0, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU cannot do")
@pytest.mark.parametrize("backend", ["flex", "flash", "te"])
def test_a_backend_that_cannot_train_here_is_refused_with_those_that_can(backend: str) -> None:
    config = replace(MODEL, attention_backend=AttentionBackend(backend))
    with pytest.raises(ConfigError, match="has no backward on cpu") as caught:
        require_support(
            config,
            parallel=ParallelConfig(),
            precision=Precision.fp32,
            masks=MaskKind.packed_causal,
        )
    assert "use one of segment, dense" in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [
        ("flash", {"masks": MaskKind.intervals}, "does not know masks of the kind intervals"),
        ("flash", {"precision": Precision.fp32}, "computes in bf16 only"),
        ("flash", {"parallel": ParallelConfig(cp=2)}, "a2a would do"),
        ("flex", {"dropout": 0.1}, "cannot apply model.attention_dropout=0.1"),
    ],
)
def test_what_a_backend_lacks_is_named(backend: str, changes: dict, message: str) -> None:
    dropout = changes.pop("dropout", 0.0)
    config = replace(MODEL, attention_backend=AttentionBackend(backend), attention_dropout=dropout)
    wanted = {
        "parallel": ParallelConfig(cp=2, cp_comm_type=CPCommType.a2a),
        "precision": Precision.bf16,
        "masks": MaskKind.packed_causal,
    }
    with pytest.raises(ConfigError, match=message):
        require_support(config, **(wanted | changes))


def test_the_oracle_and_segment_are_never_refused() -> None:
    for backend in (AttentionBackend.segment, AttentionBackend.dense):
        require_support(
            replace(MODEL, attention_backend=backend, attention_dropout=0.1),
            parallel=ParallelConfig(cp=2),
            precision=Precision.fp32,
            masks=MaskKind.intervals,
        )
