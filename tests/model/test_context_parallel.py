import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu35.model.attention import dense, segment
from emu35.model.context import AttentionContext
from emu35.model.context_parallel import deal_rows
from emu35.model.mask import AttentionMask


@st.composite
def masks(draw: st.DrawFn) -> AttentionMask:
    """A packed row of causal documents, in which some spans see each other whole."""
    length = 32
    start = torch.zeros(1, length, dtype=torch.int64)
    for cut in sorted(draw(st.sets(st.integers(1, length - 1), max_size=4))):
        start[0, cut:] = cut
    mask = AttentionMask.causal(start)
    if draw(st.booleans()):
        first = draw(st.integers(0, length - 4))
        last = draw(st.integers(first + 1, length))
        mask.start2_BS[0, first:last] = first
        mask.end2_BS[0, first:last] = last
        mask.start1_BS[0, first:last] = 0
        mask.end1_BS[0, first:last] = draw(st.integers(0, first))
    return mask


@given(mask=masks(), ranks=st.sampled_from([2, 4]))
@settings(max_examples=60, deadline=None)
def test_dealt_rows_attend_as_in_one_piece(mask: AttentionMask, ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 32, 8, generator=generator)
    key, value = torch.randn(2, 1, 2, 32, 8, generator=generator)
    shares = deal_rows(mask.visible_keys().sum(0), ranks=ranks)
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(32))
    assert len({len(share) for share in shares}) == 1
    for backend in (segment, dense):
        whole = backend.attend(
            query, key_BGKD=key, value_BGKD=value, context=AttentionContext(mask=mask)
        )
        for rows in shares:
            context = AttentionContext(mask=mask.take(rows))
            part = backend.attend(
                query[:, :, rows], key_BGKD=key, value_BGKD=value, context=context
            )
            torch.testing.assert_close(part, whole[:, :, rows], rtol=0, atol=1e-5)


@given(cuts=st.sets(st.integers(1, 1023), max_size=20), ranks=st.sampled_from([2, 4, 8]))
@settings(max_examples=60, deadline=None)
def test_ranks_get_about_equal_work(cuts: set[int], ranks: int) -> None:
    start = torch.zeros(1, 1024, dtype=torch.int64)
    for cut in sorted(cuts):
        start[0, cut:] = cut
    work_S = AttentionMask.causal(start).visible_keys().sum(0)
    shares = deal_rows(work_S, ranks=ranks)
    loads = [int(work_S[rows].sum()) for rows in shares]
    heaviest_block = int(work_S.view(16 * ranks, -1).sum(1).max())
    assert max(loads) - min(loads) <= heaviest_block


def test_one_causal_document_is_shared_out_evenly() -> None:
    """Where contiguous halves would give the second rank three times the first one's work."""
    work_S = torch.arange(1, 1025)
    loads = [int(work_S[rows].sum()) for rows in deal_rows(work_S, ranks=2)]
    assert max(loads) < 1.02 * min(loads)
