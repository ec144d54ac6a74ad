"""The loss over Emu3.5's vocabulary: our chunked projection beside the plain one, in one run.

    python scripts/bench/loss.py [--quick] [--tokens N] [--hidden N] [--chunk N] [--rounds N]

The work: from hidden states [N, H] and the output weights [282926, H], fp32, to the mean
cross-entropy and its gradients for both. Plain is ``F.cross_entropy(F.linear(hidden, weight))``;
ours is :func:`~emu35.model.logits.weighted_cross_entropy` on a real (one-layer) model. Loss and
gradients must agree to a relative 1e-5, or the script fails.

Hidden size 256 stands for the 34B model's 5,120, whose three matrix products would take minutes
here. They are the same for both contestants and grow with the hidden size; what differs, the passes
over the logits and their memory, does not. So the time ratio of the real model lies nearer to 1.

Memory is the highest resident memory of a process of its own (on a GPU: of the allocator), less
what it holds before the loss, weights and hidden states included: logits, workspaces and gradients.
Plain needs about 28 GB for 8,192 tokens. Where that is more than a quarter of the memory that is
free (``--memory`` overrides), it is measured for three smaller numbers of tokens, extended along
the straight line through them, and the script fails if they do not lie on one; the result then
says ``"plain_memory": "extended"`` instead of ``"measured"``. Ours is always measured at full
size, and ``mem_vs_plain_measured`` compares the two at the most tokens that plain was measured at.

Time is compared at the most tokens that fit for both, in one process, one after the other; the
figure is the median of the ratios within a round. The last line is JSON: ``mem_vs_plain`` and
``time_vs_plain`` are ours / plain, ``planned_vs_measured`` is the formula of ``emu35 plan`` / our
measured memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import truediv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rounds import synchronize

if TYPE_CHECKING:
    import torch

VOCABULARY = 282_926
GIB = 2**30
GRADIENT_TOLERANCE = 1e-5
LINE_TOLERANCE = 0.03


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a smoke test")
    parser.add_argument("--tokens", type=int, default=0, help="default 8192, quick 512")
    parser.add_argument("--hidden", type=int, default=0, help="default 256, quick 64")
    parser.add_argument("--chunk", type=int, default=0, help="default the stage's, quick 64")
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds (default 3, quick 2)")
    parser.add_argument("--memory", type=float, default=0.0, help="GiB that plain may take")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    # megatron-core says at import, at length, which GPU libraries it does without.
    warnings.filterwarnings("ignore", module="megatron")
    from emu35.config import PretrainConfig

    size = Size(
        tokens=options.tokens or (512 if options.quick else 8192),
        hidden=options.hidden or (64 if options.quick else 256),
        chunk=options.chunk or (64 if options.quick else PretrainConfig().loss_chunk),
        threads=options.threads,
        precision=options.precision,
    )
    if options.only is not None:
        print(json.dumps(measure_here(options.only, size=size)))
        return 0
    limit = round(options.memory * GIB) or free_memory() // 4
    return compare(size, limit=limit, rounds=options.rounds or (2 if options.quick else 3))


@dataclass(kw_only=True, slots=True, frozen=True)
class Size:
    """How much work; ``threads`` 0 leaves torch its own number."""

    tokens: int
    hidden: int
    chunk: int
    threads: int
    precision: str

    def plain_bytes(self) -> int:
        """What plain is expected to need: log-probabilities, their gradient and the gradient of
        the logits at once, and the gradient of the weights."""
        return 4 * VOCABULARY * (3 * self.tokens + self.hidden)

    def fitting(self, limit: int) -> "Size":
        """The same with half, a quarter ... of the tokens, so that plain stays within ``limit``.

        Raises:
            SystemExit: not even 8 tokens fit.
        """
        found = self
        while found.plain_bytes() > limit:
            if found.tokens < 16:
                raise SystemExit(
                    f"plain needs {found.plain_bytes() / GIB:.1f} GiB for {found.tokens} tokens, "
                    f"and may take {limit / GIB:.1f}; free some memory or give less --hidden"
                )
            found = replace(found, tokens=found.tokens // 2)
        return found


def compare(size: Size, *, limit: int, rounds: int) -> int:
    """Memory in processes of their own, then time in this one; the table and the last line."""
    fits = size.fitting(limit)
    ours = measure("emu35", size=size)
    if fits == size:
        slope, plain, ours_small = None, measure("plain", size=size)["bytes"], ours
        measured_plain = plain
    else:
        counts = [fits.tokens // 4, fits.tokens // 2, fits.tokens]
        found = {
            count: measure("plain", size=replace(size, tokens=count))["bytes"] for count in counts
        }
        slope, start = line(found)
        plain, measured_plain = round(start + slope * size.tokens), found[fits.tokens]
        ours_small = measure("emu35", size=fits)
    seconds = time_rounds(fits, rounds=rounds)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"{VOCABULARY} ids, hidden size {size.hidden}, chunks of {size.chunk} tokens")
    print(f"{'':8} {'GiB, ' + str(size.tokens):>14} {'s, ' + str(fits.tokens):>12}")
    print(f"{'emu35':8} {ours['bytes'] / GIB:14.2f} {medians['emu35']:12.2f}")
    note = "" if slope is None else "  (memory extended along a line)"
    print(f"{'plain':8} {plain / GIB:14.2f} {medians['plain']:12.2f}{note}")
    figures: dict[str, Any] = {
        "mem_vs_plain": round(ours["bytes"] / plain, 4),
        "time_vs_plain": round(statistics.median(map(truediv, *seconds.values())), 4),
        "mem_vs_plain_measured": round(ours_small["bytes"] / measured_plain, 4),
        "planned_vs_measured": round(ours["planned"] / ours["bytes"], 4),
        "plain_memory": "measured" if slope is None else "extended",
        "plain_bytes_per_logit": None if slope is None else round(slope / VOCABULARY, 3),
        "gib_emu35": round(ours["bytes"] / GIB, 3),
        "gib_plain": round(plain / GIB, 3),
        "s_emu35": round(medians["emu35"], 3),
        "s_plain": round(medians["plain"], 3),
        "memory_tokens": size.tokens,
        "time_tokens": fits.tokens,
        "hidden_size": size.hidden,
        "vocabulary": VOCABULARY,
        "chunk": size.chunk,
        "rounds": rounds,
        **about_this_machine(),
    }
    print(json.dumps(figures))
    return 0


def line(found: dict[int, int]) -> tuple[float, float]:
    """Slope and start of the straight line through bytes by tokens.

    Raises:
        SystemExit: a point lies more than 3 % off it, so that it proves nothing further out.
    """
    slope, start = statistics.linear_regression(list(found), list(found.values()))
    for tokens, size in found.items():
        expected = start + slope * tokens
        if abs(expected / size - 1) > LINE_TOLERANCE:
            shown = ", ".join(f"{size / GIB:.3f} GiB at {tokens}" for tokens, size in found.items())
            raise SystemExit(f"plain's memory does not grow in a straight line ({shown})")
    return slope, start


def measure(name: str, *, size: Size) -> dict[str, int]:
    """Run one contestant once in a fresh process: ``bytes``, and ``planned`` for ours."""
    command = [sys.executable, str(Path(__file__).resolve()), "--only", name]
    for option in ("tokens", "hidden", "chunk", "threads", "precision"):
        command += [f"--{option}", str(getattr(size, option))]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(
            f"contestant {name} failed at {size.tokens} tokens (exit code {done.returncode}, "
            "-9 usually being a lack of memory); see its message above or give less --memory"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    say(f"{name} needs {found['bytes'] / GIB:.3f} GiB for {size.tokens} tokens")
    return found


def measure_here(name: str, *, size: Size) -> dict[str, int]:
    """Peak of one forward and backward above what is there before it, in this process."""
    from peak_memory import Peak

    run = CONTESTANTS[name](inputs(size), size)
    peak = Peak()
    run()
    return {"bytes": peak.above_start(), "planned": planned_bytes(size) if name == "emu35" else 0}


@dataclass(kw_only=True, slots=True)
class Inputs:
    """A one-layer model whose output weights both use, hidden states [N, H], labels int64 [N]."""

    model: Any
    hidden_NH: "torch.Tensor"
    labels_N: "torch.Tensor"


Run = Callable[[], "tuple[torch.Tensor, ...]"]
"""One forward and backward: loss, gradient of the hidden states, gradient of the weights."""


def inputs(size: Size) -> Inputs:
    """Weights and hidden states, equal for equal sizes."""
    import torch

    from emu35.config import LMConfig, Precision
    from emu35.model.build import build_model
    from emu35.model.init import initialize
    from emu35.parallel.device import local_device
    from emu35.parallel.mesh import single_process_mesh

    if size.threads:
        torch.set_num_threads(size.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    single_process_mesh()
    config = LMConfig(
        num_layers=1,
        hidden_size=size.hidden,
        ffn_hidden_size=size.hidden,
        num_attention_heads=1,
        num_kv_heads=1,
        head_dim=32,
    )
    precision = Precision(size.precision)
    model = build_model(config, vocabulary_size=VOCABULARY, precision=precision)
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(size.tokens, size.hidden, generator=generator)
    labels_N = torch.randint(0, VOCABULARY, (size.tokens,), generator=generator)
    device, dtype = local_device(), model.output_weight.dtype
    return Inputs(
        model=model,
        hidden_NH=hidden_NH.to(device, dtype).requires_grad_(),
        labels_N=labels_N.to(device),
    )


def plain(given: Inputs, size: Size) -> Run:
    """Plain torch, at its most sparing: nothing holds the logits but autograd."""
    import torch
    import torch.nn.functional as F

    del size
    weight_VH = given.model.output_weight

    def run() -> tuple[torch.Tensor, ...]:
        # Without a GPU our CPU shim watches every torch call; its cost is ours alone.
        with torch._C.DisableTorchFunction():
            loss = F.cross_entropy(F.linear(given.hidden_NH, weight_VH), given.labels_N)
            return loss.detach(), *torch.autograd.grad(loss, (given.hidden_NH, weight_VH))

    return run


def chunked(given: Inputs, size: Size) -> Run:
    """The loss of a training step, every token with the same weight."""
    import torch

    from emu35.model.logits import weighted_cross_entropy

    weights_BS = torch.full_like(given.labels_N, 1, dtype=torch.float32)[None] / size.tokens

    def run() -> tuple[torch.Tensor, ...]:
        loss, _ = weighted_cross_entropy(
            given.model,
            hidden_SBH=given.hidden_NH[:, None],
            labels_BS=given.labels_N[None],
            weights_BS=weights_BS,
            chunk=size.chunk,
        )
        wanted = (given.hidden_NH, given.model.output_weight)
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    return run


CONTESTANTS: dict[str, Callable[[Inputs, Size], Run]] = {"emu35": chunked, "plain": plain}


def time_rounds(size: Size, *, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round by contestant, after a first one that compares what they found."""
    given = inputs(size)
    runs = {name: make(given, size) for name, make in CONTESTANTS.items()}
    check_equal(runs["emu35"](), runs["plain"]())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(rounds):
        for name, run in runs.items():
            seconds[name].append(time_run(run))
        shown = ", ".join(f"{name} {found[-1]:.2f} s" for name, found in seconds.items())
        say(f"round {done + 1} of {rounds} at {size.tokens} tokens: {shown}")
    return seconds


def time_run(run: Run) -> float:
    """Seconds of one forward and backward, the device's queue empty at both ends."""
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - began


def check_equal(ours: "tuple[torch.Tensor, ...]", theirs: "tuple[torch.Tensor, ...]") -> None:
    for name, a, b in zip(
        ("loss", "hidden gradient", "weight gradient"), ours, theirs, strict=True
    ):
        off = float((a - b).norm() / b.norm())
        if not off <= GRADIENT_TOLERANCE:
            raise SystemExit(f"{name}: ours is off by {off:.1e} of plain's; not the same work")


def planned_bytes(size: Size) -> int:
    """What ``emu35 plan`` says that our loss needs."""
    from emu35.config import ParallelConfig, Precision
    from emu35.planner.memory import loss_bytes

    return loss_bytes(
        tokens=size.tokens,
        chunk=size.chunk,
        hidden_size=size.hidden,
        vocabulary_size=VOCABULARY,
        parallel=ParallelConfig(),
        precision=Precision(size.precision),
    )


def free_memory() -> int:
    """Bytes that this process could still take."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def say(text: str) -> None:
    print(f"[bench] {text}", file=sys.stderr, flush=True)


def about_this_machine() -> dict[str, Any]:
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


if __name__ == "__main__":
    sys.exit(main())
