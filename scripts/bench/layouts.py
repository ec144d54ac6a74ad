"""What each parallel layout costs and saves, beside one process, in one run.

    python scripts/bench/layouts.py [--quick] [--rounds N]

Every layout trains the same model on the same packed row (fp32) with as many ranks of one thread as
it has; the reference is one process with that many threads, so that both have the same cores. For
each layout four figures: the time of a step against the reference (median over rounds, layouts
alternating), bytes over the loopback interface for a token and step, the bytes of weights,
gradients and optimizer state that a rank holds, and the peak of its resident memory above what
importing takes, the last two against one process. Times on one machine say what a layout costs
where communication is cheap; bytes say what it will cost on a network. Other traffic on loopback
during the run is counted too, so let there be none.

The last line is JSON: {layout: {"time": ..., "sent_per_token": ..., "state": ..., "memory": ...}}.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "pp2-vpp2": {"pp": 2, "vpp": 2},
    "cp2": {"cp": 2},
    "cp2-a2a": {"cp": 2, "cp_comm_type": "a2a"},
    "dp2": {},
    "dp2-zero1": {"zero1": True},
    "one-recompute": {"ranks": 1, "recompute": "full"},
}
RANKS = 2
MODEL: dict[str, Any] = {
    "num_layers": 8,
    "hidden_size": 256,
    "ffn_hidden_size": 768,
    "num_attention_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 32,
}
VOCABULARY, ROWS = 8192, 4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short row, for a smoke test")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        serve(json.loads(options.rank))
        return 0
    length = 128 if options.quick else 512
    groups = {"one": Group({"ranks": 1, "threads": RANKS}, length=length)}
    for name, layout in LAYOUTS.items():
        ranks = layout.get("ranks", RANKS)
        groups[name] = Group({"threads": RANKS // ranks, **layout}, length=length)
    try:
        rounds = [
            {name: group.step() for name, group in groups.items()}
            for _ in range(options.rounds + 1)
        ][1:]
        facts = {name: group.facts() for name, group in groups.items()}
    finally:
        for group in groups.values():
            group.close()
    report(rounds, facts=facts, length=length)
    return 0


class Group:
    """The ranks of one layout; between steps they wait for the next line."""

    def __init__(self, layout: dict[str, Any], *, length: int) -> None:
        ranks = layout.get("ranks", RANKS)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.processes: list[subprocess.Popen[str]] = []
        for rank in range(ranks):
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": str(layout["threads"]),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "GLOO_SOCKET_IFNAME": "lo",
            }
            specification = json.dumps({**layout, "length": length})
            command = [sys.executable, str(Path(__file__).resolve()), "--rank", specification]
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        self._ask("ready")

    def step(self) -> tuple[float, int]:
        """Seconds of one training step, and bytes over loopback meanwhile."""
        before = loopback_bytes()
        began = time.perf_counter()
        self._ask("step")
        return time.perf_counter() - began, loopback_bytes() - before

    def facts(self) -> dict[str, float]:
        return self._ask("facts")

    def close(self) -> None:
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _ask(self, question: str) -> dict[str, Any]:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(question + "\n")
            process.stdin.flush()
        answers = [json.loads(_stream(process.stdout).readline()) for process in self.processes]
        return answers[0]


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def serve(layout: dict[str, Any]) -> None:
    """One rank: answer every line of standard input with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    import torch

    torch.set_num_threads(layout["threads"])
    before = resident_bytes("VmRSS")
    task = build(layout)
    steps = 0
    for line in sys.stdin:
        answer: dict[str, float] = {}
        if line.strip() == "step":
            steps += 1
            task.train_step(steps)
        elif line.strip() == "facts":
            answer["state"] = state_bytes(task)
            answer["memory"] = resident_bytes("VmHWM") - before
        print(json.dumps(answer), file=answers, flush=True)


def build(layout: dict[str, Any]) -> Any:
    """The task that training runs, on a loader that repeats one packed row per micro-batch."""
    from emu35.config import (
        EngineConfig,
        LMConfig,
        ParallelConfig,
        PretrainConfig,
        Recompute,
        RunConfig,
    )
    from emu35.config.parallel import CPCommType
    from emu35.model.build import build_chunks
    from emu35.model.init import initialize
    from emu35.parallel.mesh import init_mesh
    from emu35.train.objective import Term, weights_by_modality
    from emu35.train.step import LMTask

    names = ("tp", "sp", "pp", "vpp", "cp", "zero1")
    parallel = ParallelConfig(
        **{name: layout[name] for name in names if name in layout},
        cp_comm_type=CPCommType(layout.get("cp_comm_type", "all_gather")),
    )
    run = RunConfig(
        model=LMConfig(**MODEL, max_position_embeddings=layout["length"]),
        stage=PretrainConfig(global_batch_size=ROWS),
        parallel=parallel,
        engine=EngineConfig(recompute=Recompute(layout.get("recompute", "none"))),
    )
    mesh = init_mesh(parallel, seed=0)
    model, stage = run.model, run.stage
    assert isinstance(model, LMConfig)
    assert isinstance(stage, PretrainConfig)
    chunks = build_chunks(model, vocabulary_size=VOCABULARY, parallel=parallel, engine=run.engine)
    for chunk in chunks:
        initialize(chunk, seed=0)
    return LMTask(
        config=run,
        mesh=mesh,
        chunks=chunks,
        loader=SameRows(length=layout["length"], rows=ROWS // mesh.dp_size),  # type: ignore[arg-type]
        validation={},
        terms=[Term(name="labels", token_weights=weights_by_modality(stage.loss_weights))],
    )


class SameRows:
    """Stands in for the loader: packed rows of documents of unequal length."""

    def __init__(self, *, length: int, rows: int) -> None:
        import torch

        from emu35.data.batch import Batch

        generator = torch.Generator().manual_seed(0)
        tokens_BS = torch.randint(0, VOCABULARY, (1, length), generator=generator)
        columns_S = torch.arange(length)
        start_S = torch.zeros_like(columns_S)
        for cut in (length // 8, length // 2, 3 * length // 4):
            start_S[cut:] = cut
        valid_S = torch.ones_like(columns_S, dtype=torch.bool)
        valid_S[-1] = False
        valid_S[:-1] &= start_S[1:] == start_S[:-1]
        self.batches = [
            Batch(
                tokens=tokens_BS,
                labels=tokens_BS.roll(-1, 1),
                label_modality=torch.zeros_like(tokens_BS, dtype=torch.uint8),
                label_valid=valid_S[None],
                label_source=torch.zeros_like(tokens_BS, dtype=torch.int16),
                positions=(columns_S - start_S)[None],
                document_start=start_S[None],
                sample_ids=[0],
            )
        ] * rows

    def next_step(self) -> list[Any]:
        return self.batches


def state_bytes(task: Any) -> int:
    """Weights, gradient buffers and optimizer state of this rank."""
    weights = sum(p.nbytes for chunk in task.chunks for p in chunk.parameters())
    gradients = sum(b.grad_data.nbytes for chunk in task.wrapped for b in chunk.buffers)
    parts = getattr(task.optimizer, "chained_optimizers", [task.optimizer])
    moments = sum(
        tensor.nbytes
        for part in parts
        for state in part.optimizer.state.values()
        for tensor in state.values()
        if hasattr(tensor, "nbytes")
    )
    return weights + gradients + moments


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (highest) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def loopback_bytes() -> int:
    """Bytes sent over the loopback interface since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    raise SystemExit("/proc/net/dev has no loopback interface")


def report(
    rounds: list[dict[str, tuple[float, int]]], *, facts: dict[str, dict[str, float]], length: int
) -> None:
    tokens = length * ROWS
    figures: dict[str, dict[str, float]] = {}
    print(f"{'':16} {'time':>7} {'B/token':>9} {'state':>7} {'memory':>7}   (one process = 1)")
    for name in facts:
        time_ratio = statistics.median(row[name][0] / row["one"][0] for row in rounds)
        sent = statistics.median(row[name][1] for row in rounds) / tokens
        figures[name] = {
            "time": round(time_ratio, 3),
            "sent_per_token": round(sent, 1),
            "state": round(facts[name]["state"] / facts["one"]["state"], 3),
            "memory": round(facts[name]["memory"] / facts["one"]["memory"], 3),
        }
        found = figures[name]
        print(
            f"{name:16} {found['time']:7.2f} {found['sent_per_token']:9.0f} "
            f"{found['state']:7.2f} {found['memory']:7.2f}"
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(main())
