"""Discrete diffusion adaptation in figures, in one run.

    python scripts/bench/dida.py [--quick] [--rounds N] [--threads N] [--run runs/demo/dida]

The training step on a packed row with noisy copies, about 8,000 tokens: attention by segments
against the dense mask, alternating; losses must agree. And the memory of a step by the length of
the row, each in a process of its own: it grows linearly by segments. See :mod:`dida_step`.

With ``--run``, which names the demo's adapted model, generation: held-out captions drawn token by
token and in parallel. See :mod:`dida_generation`.

The last line is JSON: ``train_step_speedup`` is the median over rounds of dense / segment;
``memory_power_*`` the power of the length that the memory grows with. ``forwards_per_image``,
``steps``, ``accuracy_ar``, ``accuracy_dida`` and ``wall_ratio`` concern generation; null stands for
what this run has not measured. ``--quick`` takes short rows, on which speeds mean nothing.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

NOT_MEASURED: dict[str, Any] = dict.fromkeys(
    ("forwards_per_image", "steps", "accuracy_ar", "accuracy_dida", "wall_ratio")
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short rows, for a smoke test")
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds (default 5, quick 1)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--run", type=Path, help="the demo's run of stage=dida, to draw with")
    parser.add_argument("--prompts", type=int, default=256, help="captions to draw (default 256)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at a time (default)")
    parser.add_argument("--temperature", type=float, default=0.5, help="of pictures (default 0.5)")
    options = parser.parse_args()
    # megatron-core says at import, at length, which GPU libraries it does without.
    warnings.filterwarnings("ignore", module="megatron")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    figures = NOT_MEASURED | training(options)
    if options.run is not None:
        from dida_generation import measure_generation

        figures |= measure_generation(
            options.run,
            prompts=options.prompts,
            batch_size=options.batch_size,
            temperature=options.temperature,
        )
    figures |= {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    print(json.dumps(figures))
    return 0


def training(options: argparse.Namespace) -> dict[str, Any]:
    """Memory first, for its processes are forked from one that has not computed yet."""
    from dida_step import RowShape, measure_memory, measure_time

    from emu35.config import ParallelConfig
    from emu35.parallel.mesh import init_mesh

    side = 8 if options.quick else 30
    counts = (1, 2) if options.quick else (1, 2, 4)
    memory = measure_memory([RowShape(documents=count, side=side) for count in counts])
    rounds = options.rounds or (1 if options.quick else 5)
    mesh = init_mesh(ParallelConfig(), seed=0)
    found = measure_time(RowShape(documents=2, side=side), rounds=rounds, mesh=mesh)
    return {**found, **memory, "rounds": rounds}


if __name__ == "__main__":
    sys.exit(main())
