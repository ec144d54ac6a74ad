"""One training step of emu35 beside Hugging Face's Qwen3 and plain torch, in one run.

    python scripts/bench/train_step.py [--quick] [--threads N] [--profile]

A step is forward, backward, gradient clipping and AdamW in fp32 on one packed row of plain causal
tokens. Ours is the step that training runs: the batch through megatron-core's schedule, the
chunked loss, the optimizer that the stage builds. The other two get the same weights, the same
optimizer settings (fused AdamW, no decay on norms) and no logging. All three losses must agree at
the start and still after the timed updates; otherwise the script fails rather than compare
different work.

The steps are interleaved (ours, HF, plain, ours, ...), and the figures are medians of the ratios
within a round, so that a machine that slows down slows all three. The last line is JSON:
``plain_vs_hf`` = our time / HF's time, ``plain_vs_torch`` = our time / plain torch's time.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from bench_venv import run_in_venv

REQUIREMENTS = ["transformers>=5.0"]
INSIDE = "EMU35_BENCH_INSIDE"
VOCABULARY, LENGTH, LEARNING_RATE, CLIP = 8192, 1024, 1e-4, 1.0
NAMES = ("emu35", "HF Qwen3", "plain torch")

Step = Callable[[], float]
"""Makes one training step and returns the loss before it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, for a smoke test")
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds (default 20, quick 4)")
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
    return measure(options)


def measure(options: argparse.Namespace) -> int:
    # megatron-core says at import, at length, which GPU libraries it does without.
    warnings.filterwarnings("ignore", module="megatron")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    steps = build_steps()
    warm_up = 1 if options.quick else 3
    rounds = options.rounds or (4 if options.quick else 20)
    first = [step() for step in steps]
    check_equal(first, tolerance=1e-4, when="before the first update")
    for _ in range(warm_up - 1):
        for step in steps:
            step()
    if options.profile:
        for name, step in zip(NAMES, steps, strict=True):
            profile(step, name=name)
    seconds: list[list[float]] = []
    last: list[float] = []
    for done in range(rounds):
        timed = [time_step(step) for step in steps]
        last = [loss for loss, _ in timed]
        seconds.append([duration for _, duration in timed])
        show_progress(done + 1, rounds)
    # Rounding grows from update to update; different work would be off by far more.
    check_equal(last, tolerance=1e-4, when=f"after {warm_up + rounds - 1} updates")
    report(seconds, first=first, last=last)
    return 0


def build_steps() -> list[Step]:
    """The three contestants, with equal weights, on the same tokens."""
    import torch

    from emu35.checkpoint.hf import to_hf
    from emu35.config import LMConfig
    from emu35.parallel.mesh import local_device

    config = LMConfig(
        num_layers=8,
        hidden_size=256,
        ffn_hidden_size=768,
        num_attention_heads=8,
        num_kv_heads=4,
        head_dim=32,
        max_position_embeddings=LENGTH,
    )
    tokens_BS = torch.randint(
        0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    task, model = our_task(config, tokens_BS=tokens_BS)
    state = {name: value.detach().clone() for name, value in model.named_parameters()}
    weights = to_hf(state, config=config, vocabulary_size=VOCABULARY)
    tokens_BS = tokens_BS.to(local_device())
    return [
        lambda: task.train_step(1)["loss"],
        hf_step(config, weights=weights, tokens_BS=tokens_BS),
        plain_step(config, weights=weights, tokens_BS=tokens_BS),
    ]


def our_task(config: Any, *, tokens_BS: Any) -> tuple[Any, Any]:
    """The task that pretraining hands to the trainer, on a loader that repeats one batch."""
    from emu35.config import (
        LossWeights,
        OptimConfig,
        ParallelConfig,
        PretrainConfig,
        RunConfig,
        Schedule,
    )
    from emu35.data.loader import TokenLoader
    from emu35.model.build import build_chunks
    from emu35.model.init import initialize
    from emu35.parallel.mesh import init_mesh
    from emu35.train.objective import weights_by_modality
    from emu35.train.step import LMTask

    run = RunConfig(
        model=config,
        stage=PretrainConfig(global_batch_size=1),
        optim=OptimConfig(
            lr=LEARNING_RATE, warmup_steps=0, schedule=Schedule.constant, clip_grad=CLIP
        ),
    )
    mesh = init_mesh(ParallelConfig(), seed=run.seed)
    chunks = build_chunks(config, vocabulary_size=VOCABULARY, parallel=run.parallel)
    initialize(chunks[0], seed=run.seed)
    task = LMTask(
        config=run,
        mesh=mesh,
        chunks=chunks,
        loader=cast(TokenLoader, OneBatch(tokens_BS)),
        validation={},
        token_weights=weights_by_modality(LossWeights()),
    )
    return task, chunks[0]


class OneBatch:
    """Stands in for the loader: the same plain causal row at every step."""

    def __init__(self, tokens_BS: Any) -> None:
        import torch

        from emu35.data.batch import Batch

        labels_BS, valid_BS = tokens_BS.roll(-1, 1), torch.ones_like(tokens_BS, dtype=torch.bool)
        valid_BS[:, -1] = False
        self.batch = Batch(
            tokens=tokens_BS,
            labels=labels_BS,
            label_modality=torch.zeros_like(tokens_BS, dtype=torch.uint8),
            label_valid=valid_BS,
            positions=torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS).contiguous(),
            document_start=torch.zeros_like(tokens_BS),
            sample_ids=[0],
        )

    def next_step(self) -> list[Any]:
        return [self.batch]


def hf_step(config: Any, *, weights: dict[str, Any], tokens_BS: Any) -> Step:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    assert model.config._attn_implementation == "sdpa", "the fastest of HF's own on a CPU"
    return torch_step(
        model,
        weights=weights,
        loss=lambda: model(input_ids=tokens_BS, labels=tokens_BS).loss,
        device=tokens_BS.device,
    )


def plain_step(config: Any, *, weights: dict[str, Any], tokens_BS: Any) -> Step:
    from plain_transformer import PlainTransformer

    model = PlainTransformer(config, vocabulary_size=VOCABULARY)
    return torch_step(
        model, weights=weights, loss=lambda: model(tokens_BS), device=tokens_BS.device
    )


def torch_step(
    model: Any, *, weights: dict[str, Any], loss: Callable[[], Any], device: Any
) -> Step:
    """The usual loop body around a torch module, with the optimizer settings of ours."""
    import torch

    from emu35.config import OptimConfig

    model.load_state_dict(weights)
    model.to(device).train()
    settings = OptimConfig()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in parameters if p.ndim > 1],
                "weight_decay": settings.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        fused=True,
    )

    def step() -> float:
        # Without a GPU our CPU shim watches every torch call of the process. Its cost is ours
        # alone, so the others run outside it.
        with torch._C.DisableTorchFunction():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            return value.item()

    return step


def time_step(step: Step) -> tuple[float, float]:
    """Loss and seconds of one step, the device's queue empty at both ends."""
    synchronize()
    began = time.perf_counter()
    loss = step()
    synchronize()
    return loss, time.perf_counter() - began


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_equal(losses: list[float], *, tolerance: float, when: str) -> None:
    if max(losses) - min(losses) > tolerance:
        shown = ", ".join(f"{n} {v:.6f}" for n, v in zip(NAMES, losses, strict=True))
        raise SystemExit(f"losses differ {when}: {shown}; the times would compare different work")


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


def report(seconds: list[list[float]], *, first: list[float], last: list[float]) -> None:
    import torch
    import transformers

    medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
    print(f"{'':12} {'ms/step':>9} {'tokens/s':>9} {'first loss':>11} {'last loss':>11}")
    for name, duration, start, end in zip(NAMES, medians, first, last, strict=True):
        rate = LENGTH / duration
        print(f"{name:12} {1e3 * duration:9.1f} {rate:9.0f} {start:11.6f} {end:11.6f}")
    figures = {
        "plain_vs_hf": ratio((ours, hf) for ours, hf, _ in seconds),
        "plain_vs_torch": ratio((ours, plain) for ours, _, plain in seconds),
        "ms_emu35": round(1e3 * medians[0], 2),
        "ms_hf": round(1e3 * medians[1], 2),
        "ms_torch": round(1e3 * medians[2], 2),
        "rounds": len(seconds),
        "sequence_length": LENGTH,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    print(json.dumps(figures))


def ratio(pairs: Iterable[tuple[float, float]]) -> float:
    """Median over rounds of ours / theirs."""
    return round(statistics.median(ours / theirs for ours, theirs in pairs), 4)


if __name__ == "__main__":
    sys.exit(main())
