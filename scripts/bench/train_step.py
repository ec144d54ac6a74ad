"""One training step of emu35 beside Hugging Face's Qwen3 and plain torch, in one run.

    python scripts/bench/train_step.py [--quick] [--threads N] [--profile]

A step is forward, backward, gradient clipping and AdamW in fp32 on one row of tokens. Ours is the
step that training runs: the batch through megatron-core's schedule, the chunked loss, the optimizer
that the stage builds. The others get the same weights, the same optimizer settings (fused AdamW, no
decay on norms) and no logging. Two cases:

- plain: one causal document of 1,024 tokens; ours, HF and a hundred lines of plain torch.
- packed: one row of 8,192 tokens that holds 16 documents, as pretraining packs them. Positions
  restart and attention stays within a document: ours by the intervals of the segment backend, HF by
  the equal S x S mask in its sdpa attention, the only way its model has without a GPU.

All losses of a case must agree at the start and still after the timed updates; otherwise the
script fails rather than compare different work. The steps are interleaved (ours, HF, plain, ours,
...), and the figures are medians of the ratios within a round, so that a machine that slows down
slows all of them. The last line is JSON: ``plain_vs_hf`` = our time / HF's time, ``plain_vs_torch``
= our time / plain torch's time, ``packed_vs_hf`` = our time / HF's time on the packed row.
``--quick`` times fewer rounds of the same steps.
"""

import argparse
import json
import os
import statistics
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_venv import run_in_venv
from rounds import Step, check_equal, time_step

if TYPE_CHECKING:
    from contestants import Contestants

REQUIREMENTS = ["transformers>=5.0"]
INSIDE = "EMU35_BENCH_INSIDE"
PLAIN_LENGTH = 1024
# fmt: off
PACKED_LENGTHS = (
    517, 1289, 63, 704, 258, 951, 129, 385, 831, 97, 642, 190, 768, 446, 321, 601,
)
# fmt: on
"""Sixteen documents, 63 to 1,289 tokens long, 8,192 together."""
TOLERANCE = 1e-4
"""Of losses, in nats."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, for a smoke test")
    parser.add_argument("--rounds", type=int, default=0, help="plain rounds (default 20, quick 4)")
    parser.add_argument(
        "--packed-rounds", type=int, default=0, help="packed rounds (default 5, quick 1)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    options = parser.parse_args()
    if os.environ.get(INSIDE) != "1":
        os.environ[INSIDE] = "1"
        return run_in_venv(
            "train_step",
            requirements=REQUIREMENTS,
            script=Path(__file__).resolve(),
            arguments=sys.argv[1:],
        )
    return compare(options)


def compare(options: argparse.Namespace) -> int:
    """Both cases, one after the other, so that neither holds memory while the other is timed."""
    # megatron-core says at import, at length, which GPU libraries it does without.
    warnings.filterwarnings("ignore", module="megatron")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False

    from contestants import on_packed_row, on_plain_row

    from emu35.config import ParallelConfig, RunConfig
    from emu35.parallel.mesh import init_mesh

    mesh = init_mesh(ParallelConfig(), seed=RunConfig().seed)
    plain = measure(
        on_plain_row(PLAIN_LENGTH, mesh=mesh),
        title=f"plain: 1 x {PLAIN_LENGTH} tokens",
        warm_up=1 if options.quick else 3,
        rounds=options.rounds or (4 if options.quick else 20),
        show_profile=options.profile,
    )
    packed = measure(
        on_packed_row(PACKED_LENGTHS, mesh=mesh),
        title=f"packed: 1 x {sum(PACKED_LENGTHS)} tokens, {len(PACKED_LENGTHS)} documents",
        warm_up=1,
        rounds=options.packed_rounds or (1 if options.quick else 5),
        show_profile=options.profile,
    )
    print(json.dumps(figures(plain, packed=packed)))
    return 0


@dataclass(kw_only=True, slots=True, frozen=True)
class Times:
    """Seconds of every round, by contestant."""

    seconds: dict[str, list[float]]

    def median_ms(self, name: str) -> float:
        return round(1e3 * statistics.median(self.seconds[name]), 2)

    def ours_to(self, other: str) -> float:
        """Median over rounds of our time / theirs."""
        pairs = zip(self.seconds["emu35"], self.seconds[other], strict=True)
        return round(statistics.median(ours / theirs for ours, theirs in pairs), 4)


def measure(
    contestants: "Contestants", *, title: str, warm_up: int, rounds: int, show_profile: bool
) -> Times:
    """Time all contestants round by round and print what was found.

    Raises:
        SystemExit: their losses differ.
    """
    steps, tokens = contestants.steps, contestants.row.tokens_BS.numel()
    first = {name: step() for name, step in steps.items()}
    check_equal(first, when=f"before the first update ({title})", tolerance=TOLERANCE)
    for _ in range(warm_up - 1):
        for step in steps.values():
            step()
    if show_profile:
        for name, step in steps.items():
            profile(step, name=f"{title}, {name}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    last = first
    for done in range(rounds):
        timed = {name: time_step(step) for name, step in steps.items()}
        last = {name: loss for name, (loss, _) in timed.items()}
        for name, (_, duration) in timed.items():
            seconds[name].append(duration)
        show_progress(done + 1, rounds)
    # Rounding grows from update to update; different work would be off by far more.
    check_equal(last, when=f"after {warm_up + rounds - 1} updates ({title})", tolerance=TOLERANCE)
    times = Times(seconds=seconds)
    print(f"{title:38} {'ms/step':>9} {'tokens/s':>9} {'first loss':>11} {'last loss':>11}")
    for name in steps:
        duration = times.median_ms(name)
        rate = 1e3 * tokens / duration
        print(f"  {name:36} {duration:9.1f} {rate:9.0f} {first[name]:11.6f} {last[name]:11.6f}")
    return times


def profile(step: Step, *, name: str) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU]) as found:
        step()
    print(f"--- {name}")
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=18))


def show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rround {done}/{total}", end="\n" if done == total else "", file=sys.stderr)


def figures(plain: Times, *, packed: Times) -> dict[str, Any]:
    """The last line: ratios first, then what they were made of."""
    import torch
    import transformers

    return {
        "plain_vs_hf": plain.ours_to("HF Qwen3"),
        "plain_vs_torch": plain.ours_to("plain torch"),
        "packed_vs_hf": packed.ours_to("HF Qwen3"),
        "ms_emu35": plain.median_ms("emu35"),
        "ms_hf": plain.median_ms("HF Qwen3"),
        "ms_torch": plain.median_ms("plain torch"),
        "packed_ms_emu35": packed.median_ms("emu35"),
        "packed_ms_hf": packed.median_ms("HF Qwen3"),
        "rounds": len(plain.seconds["emu35"]),
        "packed_rounds": len(packed.seconds["emu35"]),
        "sequence_length": PLAIN_LENGTH,
        "packed_sequence_length": sum(PACKED_LENGTHS),
        "packed_documents": len(PACKED_LENGTHS),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
