"""Masks as intervals beside the usual ways, in one run.

    python scripts/bench/mask.py [--quick] [--rounds N]

Two comparisons, each of equal results:

- a block mask for flex attention, counted from the intervals, against ``create_block_mask``
  (torch's search over the mask function, compiled and warm) for a packed row of 32,768 tokens
  with two intervals a row; every block must be the same;
- attention forward and backward by segments, against scaled dot-product attention with the dense
  boolean mask, on a DiDA-shaped row of about 7,000 tokens: packed causal documents, then a
  bidirectional noisy copy of every picture that also sees what precedes the picture. Outputs and
  gradients must agree.

Contestants alternate; figures are medians of the ratios within a round. The last line is JSON:
``blockmask_speedup`` and ``segment_speedup``, their time / ours.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rounds import synchronize
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from emu35.model.attention import dense, flex, segment
from emu35.model.context import AttentionContext
from emu35.model.mask import AttentionMask

HEADS, GROUPS, HEAD_DIM = 4, 2, 64


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short rows, for a smoke test")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    options = parser.parse_args()
    blocks = measure_blocks(2_048 if options.quick else 32_768, rounds=options.rounds)
    segments = measure_segments(1_024 if options.quick else 7_168, rounds=options.rounds)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    figures = {**blocks, **segments, "device": where, "threads": torch.get_num_threads()}
    print(json.dumps(figures | {"rounds": options.rounds, "torch": str(torch.__version__)}))
    return 0


def measure_blocks(length: int, *, rounds: int) -> dict[str, float]:
    mask = dida_mask(length, picture=256 if length < 8_192 else 1_024, text=100)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = flex.block_mask(mask, num_keys=length, device=device)
    search: Any = torch.compile(create_block_mask)
    visible = ours.mask_mod

    def searched() -> BlockMask:
        return search(visible, B=1, H=1, Q_LEN=length, KV_LEN=length, device=str(device))

    if not same_blocks(ours, searched()):
        raise SystemExit("the counted block mask is not the one that torch finds")
    seconds = alternate(
        [lambda: flex.block_mask(mask, num_keys=length, device=device), searched], rounds=rounds
    )
    report(f"block mask, {length:,} tokens", names=("counted", "searched"), seconds=seconds)
    return {
        "blockmask_speedup": ratio(seconds),
        "blockmask_tokens": length,
        "ms_counted": milliseconds(seconds, 0),
        "ms_searched": milliseconds(seconds, 1),
    }


def measure_segments(length: int, *, rounds: int) -> dict[str, float]:
    mask = dida_mask(length, picture=256 if length < 4_096 else 1_024, text=100)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, length, HEAD_DIM, generator=generator).to(device).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    upstream = torch.randn(1, HEADS, length, HEAD_DIM, generator=generator).to(device)
    # Rows that see nothing are given one key: SDPA alone answers them with NaN.
    matrix = mask.to(device).dense(length)[:, None]
    matrix = matrix | ~matrix.any(-1, keepdim=True)

    def with_matrix() -> list[torch.Tensor]:
        output = F.scaled_dot_product_attention(*inputs, attn_mask=matrix, enable_gqa=True)
        return [output, *torch.autograd.grad(output, inputs, upstream)]

    def by(backend: Any) -> list[torch.Tensor]:
        query, key, value = inputs
        output = backend.attend(
            query, key_BGKD=key, value_BGKD=value, context=AttentionContext(mask=mask)
        )
        return [output, *torch.autograd.grad(output, inputs, upstream)]

    for ours, oracle in zip(by(segment), by(dense), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-4)
    seconds = alternate([lambda: by(segment), with_matrix], rounds=rounds)
    report(
        f"attention forward and backward, {length:,} tokens",
        names=("segments", "dense mask"),
        seconds=seconds,
    )
    return {
        "segment_speedup": ratio(seconds),
        "segment_tokens": length,
        "ms_segment": milliseconds(seconds, 0),
        "ms_dense": milliseconds(seconds, 1),
    }


def dida_mask(length: int, *, picture: int, text: int) -> AttentionMask:
    """Documents of two texts and two pictures, then a noisy copy of every picture that sees its
    document up to the picture, and itself whole; the rest of the row is padding."""
    document = 2 * (text + picture)
    count = length // (document + 2 * picture)
    intervals: list[tuple[int, int, int, int]] = []
    copies: list[tuple[int, int]] = []
    for number in range(count):
        start = number * document
        intervals += [(start, row + 1, 0, 0) for row in range(start, start + document)]
        copies += [(start, start + text), (start, start + 2 * text + picture)]
    for start, picture_start in copies:
        row = len(intervals)
        intervals += [(start, picture_start, row, row + picture)] * picture
    intervals += [(length, 0, 0, 0)] * (length - len(intervals))
    return AttentionMask.from_intervals(torch.tensor([intervals]))


def same_blocks(ours: BlockMask, theirs: BlockMask) -> bool:
    counts = ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks")
    return all(torch.equal(getattr(ours, n), getattr(theirs, n)) for n in counts) and torch.equal(
        ours.to_dense(), theirs.to_dense()
    )


def alternate(contestants: list[Callable[[], object]], *, rounds: int) -> list[list[float]]:
    """Seconds of each contestant in each round, after one that warms up."""
    seconds: list[list[float]] = []
    for number in range(rounds + 1):
        found: list[float] = []
        for contestant in contestants:
            synchronize()
            began = time.perf_counter()
            contestant()
            synchronize()
            found.append(time.perf_counter() - began)
        if number:
            seconds.append(found)
    return seconds


def ratio(seconds: list[list[float]]) -> float:
    """Median over rounds of theirs / ours."""
    return round(statistics.median(theirs / ours for ours, theirs in seconds), 3)


def milliseconds(seconds: list[list[float]], column: int) -> float:
    return round(1e3 * statistics.median(row[column] for row in seconds), 2)


def report(title: str, *, names: tuple[str, str], seconds: list[list[float]]) -> None:
    shown = ", ".join(f"{name} {milliseconds(seconds, i)} ms" for i, name in enumerate(names))
    print(f"{title}: {shown}, ratio {ratio(seconds)}")


if __name__ == "__main__":
    sys.exit(main())
