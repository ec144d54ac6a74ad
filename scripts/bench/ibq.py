"""The image tokenizer's quantizer: chunked over the codebook, beside the formulas as written.

    python scripts/bench/ibq.py [--quick] [--rounds N] [--threads N]

Training: 1,024 latent vectors, a codebook of 131,072 rows of 256, the quantization loss and 0.05 x
the entropy term, forward and backward in fp32. ``plain`` is what the paper writes (arXiv
2412.02692), with matrices of N x K: z_q = (hard + p - sg(p)) E, z_hard = hard E, both entropies
from a softmax and a log-softmax. ``lean`` is our own oracle, which looks z_hard up and takes q from
the log-softmax. Vectors and rows have the length that training starts from
(``emu35.vision.ibq.calibrate``).

Every contestant runs in a process of its own, in turn, round by round. Its memory is the highest
resident memory that Linux saw during forward and backward (``VmHWM``, reset after the inputs were
made and a small warm-up) less what was resident at that point, so it counts gradients and whatever
the allocator holds. A ratio is the median of the ratios within a round. Besides wall seconds there
are CPU seconds of all threads, which other programs on the machine disturb less; threads sleep
while they wait (``OMP_WAIT_POLICY=passive``), so that waiting counts as no work. Denormal numbers
are flushed to zero for all, as the stage does.

Gradients are compared with an fp64 reference by autograd, a block of vectors at a time: first the
mean distribution of all, then the formulas as written with dH/da held fixed, which is the same
gradient. ``gradient_error`` is the largest difference over the largest element of the reference,
``gradient_error_norm`` the norm of the difference over that of the reference, both for latents or
codebook, whichever is larger. Plain's own errors stand beside them: logits divided by 0.01 carry a
hundred times their rounding into every probability, whatever the order of the work.

Encoding: tokens a second of ``nearest_codes`` and of einsum, softmax and argmax, in turn in one
process; and the memory of the former at two codebook sizes.

The last line is JSON: ``fused_speedup`` and ``fused_cpu_speedup`` are plain / ours,
``fused_mem_ratio`` is ours / plain, ``encode_speedup`` ours / plain in tokens a second.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MIB = 2**20
ENTROPY_WEIGHT = 0.05
COMMITMENT = 0.25


@dataclass(kw_only=True, slots=True, frozen=True)
class Size:
    """How much work: ``vectors`` N, ``rows`` K, ``dim`` D."""

    vectors: int = 1024
    rows: int = 131_072
    dim: int = 256
    threads: int = 2


QUICK = Size(vectors=128, rows=4096, dim=32)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a smoke test")
    parser.add_argument("--rounds", type=int, default=0, help="default 3, quick 1")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--job", choices=list(JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--size", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(JOBS[options.job](prepare(Size(**options.size)))))
        return 0
    size = Size(**{**asdict(QUICK if options.quick else Size()), "threads": options.threads})
    return compare(size, rounds=options.rounds or (1 if options.quick else 3))


def compare(size: Size, *, rounds: int) -> int:
    """All measurements, each in processes of their own; the table and the last line."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds):
        for name in CONTESTANTS:
            found[name].append(start(name, size=size))
            each = found[name][-1]
            say(
                f"round {number + 1} of {rounds}: {name} {each['seconds']:.1f} s, "
                f"{each['cpu']:.1f} s CPU, {each['bytes'] / MIB:.0f} MiB"
            )
    exactness = start("exactness", size=size)
    say(f"gradients off by {exactness}")
    encoding = start("encode", size=size)
    say(f"encoding: {encoding}")
    fewer = Size(**{**asdict(size), "rows": size.rows // 4})
    mib = {each.rows: start("encode_memory", size=each)["bytes"] / MIB for each in (fewer, size)}

    def ratio(field: str, over: str, under: str) -> float:
        pairs = zip(found[over], found[under], strict=True)
        return round(statistics.median(a[field] / b[field] for a, b in pairs), 4)

    print(f"{'':8} {'wall s':>8} {'CPU s':>8} {'MiB':>8}   forward + backward, medians")
    for name, runs in found.items():
        seconds, cpu, size_bytes = (
            statistics.median(run[field] for run in runs) for field in ("seconds", "cpu", "bytes")
        )
        print(f"{name:8} {seconds:8.2f} {cpu:8.2f} {size_bytes / MIB:8.0f}")
    figures = {
        "fused_speedup": ratio("seconds", "plain", "fused"),
        "fused_cpu_speedup": ratio("cpu", "plain", "fused"),
        "fused_mem_ratio": ratio("bytes", "fused", "plain"),
        "lean_speedup": ratio("seconds", "lean", "fused"),
        "lean_cpu_speedup": ratio("cpu", "lean", "fused"),
        "lean_mem_ratio": ratio("bytes", "fused", "lean"),
        **exactness,
        **encoding,
        "encode_mib": {str(rows): round(value, 1) for rows, value in mib.items()},
        "rounds": rounds,
        **asdict(size),
    }
    print(json.dumps(figures))
    return 0


def start(job: str, *, size: Size) -> dict[str, Any]:
    """Run one job in a fresh process.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--job", job]
    done = subprocess.run(
        [*command, "--size", json.dumps(asdict(size))],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(size.threads),
            "OMP_WAIT_POLICY": "passive",
        },
    )
    if done.returncode:
        raise SystemExit(
            f"{job} failed (exit code {done.returncode}, -9 usually being a lack of memory); "
            "see its message above"
        )
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(kw_only=True, slots=True)
class Inputs:
    """Latent vectors ``[N, D]`` and codebook rows ``[K, D]``, fp32."""

    z_ND: "torch.Tensor"
    codebook_KD: "torch.Tensor"


def prepare(size: Size) -> Inputs:
    """Inputs, equal for equal sizes."""
    import torch

    from emu35.vision.ibq.calibrate import MATCH_LOGIT

    torch.set_num_threads(size.threads)
    torch.set_flush_denormal(True)
    generator = torch.Generator().manual_seed(0)

    def directions(count: int) -> torch.Tensor:
        drawn = torch.randn(count, size.dim, generator=generator)
        return torch.nn.functional.normalize(drawn, dim=1).mul_(MATCH_LOGIT**0.5)

    return Inputs(z_ND=directions(size.vectors), codebook_KD=directions(size.rows))


# ------------------------------------------------------------------------ training


def objective(
    z_ND: "torch.Tensor",
    *,
    z_q_ND: "torch.Tensor",
    hard_ND: "torch.Tensor",
    entropy: "torch.Tensor",
) -> "torch.Tensor":
    both = (z_q_ND - z_ND).square().mean()
    encoder = (hard_ND.detach() - z_ND).square().mean()
    rows = (hard_ND - z_ND.detach()).square().mean()
    return both + encoder + COMMITMENT * rows + ENTROPY_WEIGHT * entropy


def fused(z_ND: "torch.Tensor", codebook_KD: "torch.Tensor") -> "torch.Tensor":
    from torch.nn import functional

    from emu35.vision.ibq.entropy import EntropySettings
    from emu35.vision.ibq.propagation import quantize

    found = quantize(z_ND, codebook_KD=codebook_KD, entropy=EntropySettings())
    assert found.entropy is not None
    hard_ND = functional.embedding(found.codes_N, codebook_KD)
    return objective(z_ND, z_q_ND=found.z_q_ND, hard_ND=hard_ND, entropy=found.entropy.loss())


def plain(z_ND: "torch.Tensor", codebook_KD: "torch.Tensor") -> "torch.Tensor":
    import torch
    from torch.nn import functional

    from emu35.vision.ibq.entropy import EntropySettings

    settings = EntropySettings()
    logits_NK = torch.einsum("nd,kd->nk", z_ND, codebook_KD)
    soft_NK = logits_NK.softmax(dim=1)
    codes_N = soft_NK.argmax(dim=1)
    hard_NK = functional.one_hot(codes_N, codebook_KD.shape[0]).to(soft_NK.dtype)
    through_NK = hard_NK + soft_NK - soft_NK.detach()
    q_NK = (logits_NK / settings.temperature).softmax(dim=1)
    log_q_NK = (logits_NK / settings.temperature).log_softmax(dim=1)
    mean_K = q_NK.mean(dim=0)
    sample = -(q_NK * log_q_NK).sum(dim=1).mean()
    codebook = -(mean_K * (mean_K + settings.eps).log()).sum()
    return objective(
        z_ND,
        z_q_ND=torch.einsum("nk,kd->nd", through_NK, codebook_KD),
        hard_ND=torch.einsum("nk,kd->nd", hard_NK, codebook_KD),
        entropy=sample - codebook,
    )


def lean(z_ND: "torch.Tensor", codebook_KD: "torch.Tensor") -> "torch.Tensor":
    from torch.nn import functional

    from emu35.vision.ibq.entropy import EntropySettings
    from emu35.vision.ibq.propagation import quantize_plain

    found = quantize_plain(z_ND, codebook_KD=codebook_KD, entropy=EntropySettings())
    assert found.entropy is not None
    hard_ND = functional.embedding(found.codes_N, codebook_KD)
    return objective(z_ND, z_q_ND=found.z_q_ND, hard_ND=hard_ND, entropy=found.entropy.loss())


Form = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]

CONTESTANTS: dict[str, Form] = {"fused": fused, "plain": plain, "lean": lean}


def train(form: Form) -> Callable[[Inputs], dict[str, float]]:
    """The job that measures one forward and backward of ``form``."""

    def measured(given: Inputs) -> dict[str, float]:
        from peak_memory import Peak

        # Threads, and the workspaces of the matrix products.
        gradients(form, Inputs(z_ND=given.z_ND[:64], codebook_KD=given.codebook_KD[:512]))
        peak = Peak()
        wall, cpu = time.perf_counter(), time.process_time()
        gradients(form, given)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"seconds": wall, "cpu": cpu, "bytes": peak.above_start()}

    return measured


def gradients(form: Form, given: Inputs) -> "tuple[torch.Tensor, ...]":
    import torch

    watched = (given.z_ND.clone().requires_grad_(), given.codebook_KD.detach().requires_grad_())
    return torch.autograd.grad(form(*watched), watched)


# ----------------------------------------------------------------------- exactness


def exactness(given: Inputs) -> dict[str, float]:
    """Relative errors of the gradients of our form and of plain."""
    expected = reference_gradients(given)

    def off(form: Form, *, prefix: str) -> dict[str, float]:
        found = [ours.double() for ours in gradients(form, given)]
        pairs = list(zip(found, expected, strict=True))
        return {
            f"{prefix}gradient_error": max(
                float((ours - exact).abs().max() / exact.abs().max()) for ours, exact in pairs
            ),
            f"{prefix}gradient_error_norm": max(
                float((ours - exact).norm() / exact.norm()) for ours, exact in pairs
            ),
        }

    return {**off(fused, prefix=""), **off(plain, prefix="plain_")}


def reference_gradients(given: Inputs, *, block: int = 32) -> "tuple[torch.Tensor, torch.Tensor]":
    """In fp64, ``block`` vectors at a time."""
    import torch

    from emu35.vision.ibq.entropy import EntropySettings, entropy_and_slope
    from emu35.vision.ibq.propagation import quantize_plain

    settings = EntropySettings()
    z_ND, codebook_KD = given.z_ND.double(), given.codebook_KD.double()
    vectors = z_ND.shape[0]
    mean_K = torch.zeros_like(codebook_KD[:, 0])
    for part_MD in z_ND.split(block):
        mean_K += (part_MD @ codebook_KD.T / settings.temperature).softmax(1).sum(0) / vectors
    # H is concave: to first order, which is all a gradient has, its slope stands for it.
    _, slope_K = entropy_and_slope(mean_K, settings=settings)
    codebook_KD.requires_grad_()
    grad_codebook_KD, grads_z = torch.zeros_like(codebook_KD), []
    for part_MD in z_ND.split(block):
        part_MD.requires_grad_()
        found = quantize_plain(part_MD, codebook_KD=codebook_KD)
        log_q_MK = (part_MD @ codebook_KD.T / settings.temperature).log_softmax(1)
        q_MK = log_q_MK.exp()
        entropy = -(q_MK * log_q_MK).sum(1).mean() - (q_MK @ slope_K).mean()
        hard_MD = codebook_KD[found.codes_N]
        loss = objective(part_MD, z_q_ND=found.z_q_ND, hard_ND=hard_MD, entropy=entropy)
        loss = loss * (part_MD.shape[0] / vectors)
        grad_z_MD, grad_part_KD = torch.autograd.grad(loss, (part_MD, codebook_KD))
        grads_z.append(grad_z_MD)
        grad_codebook_KD += grad_part_KD
    return torch.cat(grads_z), grad_codebook_KD


# ------------------------------------------------------------------------ encoding


def encode(given: Inputs, *, rounds: int = 5) -> dict[str, float]:
    """Tokens a second of both forms, in turn, after a first time that compares the codes."""
    import torch

    from emu35.vision.ibq.nearest import nearest_codes

    z_ND, codebook_KD = given.z_ND, given.codebook_KD

    def written() -> torch.Tensor:
        return torch.einsum("nd,kd->nk", z_ND, codebook_KD).softmax(dim=1).argmax(dim=1)

    def ours() -> torch.Tensor:
        return nearest_codes(z_ND, codebook_KD=codebook_KD)

    different = int((ours() != written()).sum())
    wall: dict[str, list[float]] = {"ours": [], "plain": []}
    cpu: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(rounds):
        for name, form in (("ours", ours), ("plain", written)):
            began, began_cpu = time.perf_counter(), time.process_time()
            form()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - began_cpu)

    def ratio(seconds: dict[str, list[float]]) -> float:
        pairs = zip(seconds["plain"], seconds["ours"], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "encode_speedup": ratio(wall),
        "encode_cpu_speedup": ratio(cpu),
        "encode_tokens_s": round(z_ND.shape[0] / statistics.median(wall["ours"]), 1),
        "encode_codes_different": different,
    }


def encode_memory(given: Inputs) -> dict[str, float]:
    from peak_memory import Peak

    from emu35.vision.ibq.nearest import nearest_codes

    nearest_codes(given.z_ND[:64], codebook_KD=given.codebook_KD[:512])
    peak = Peak()
    nearest_codes(given.z_ND, codebook_KD=given.codebook_KD)
    return {"bytes": peak.above_start()}


JOBS: dict[str, Callable[[Inputs], dict[str, float]]] = {
    **{name: train(form) for name, form in CONTESTANTS.items()},
    "exactness": exactness,
    "encode": encode,
    "encode_memory": encode_memory,
}


def say(text: str) -> None:
    print(f"[bench] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
