"""Reading token documents: emu35 beside webdataset, litdata and energon, on the same documents.

    python scripts/bench/loader.py [--quick] [--rounds N] [--documents N]

The work is the same for all: deliver every document once, shuffled, and copy it into rows of
32,768 int64 tokens with the number of its document beside each token. Each contender reads the
format that is natural to it: emu35 its shards (through the planner, with the checksum of every
document), webdataset tars of ``.npy`` members with ``.decode()``, megatron-energon the same tars
prepared by its own command, litdata its own chunks, numpy one flat file with an offset table. Each
runs in a process of its own, one after the other, round by
round; a figure is the median over rounds of tokens per CPU second, children included, from the
first document on, and a ratio is the median of the ratios within a round.

``emu35 batches`` is the whole :class:`~emu35.data.loader.TokenLoader`, which also writes labels,
modality, positions and validity; nobody else does that work, so no ratio is made of it.

The last line is JSON: ``vs_webdataset``, ``vs_litdata`` and ``vs_energon`` are our rate / theirs;
the figures of emu35 alone are those of ``loader_own.py``.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_venv import run_in_venv
from loader_contenders import CONTENDERS, write_all
from loader_own import measure_own, resume

REQUIREMENTS = ["webdataset>=1.0", "litdata>=0.2.50", "megatron-energon>=7.4"]
INSIDE = "EMU35_BENCH_INSIDE"


def main() -> int:
    parser = argparse.ArgumentParser(description="Document loaders compared on one set of data.")
    parser.add_argument("--quick", action="store_true", help="few documents, for a smoke test")
    parser.add_argument("--rounds", type=int, default=0, help="default 5, quick 1")
    parser.add_argument("--documents", type=int, default=0, help="default 20000, quick 2000")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if os.environ.get(INSIDE) != "1":
        os.environ[INSIDE] = "1"
        return run_in_venv(
            "loader",
            requirements=REQUIREMENTS,
            script=Path(__file__).resolve(),
            arguments=sys.argv[1:],
        )
    if options.resume is not None:
        print(json.dumps(resume(options.resume)), flush=True)
        return 0
    if options.contender is not None:
        print(json.dumps(run_contender(options.contender, data=options.data)), flush=True)
        # Some libraries keep threads alive that would hold the process at its end.
        os._exit(0)
    return compare(
        rounds=options.rounds or (1 if options.quick else 5),
        documents=options.documents or (2000 if options.quick else 20_000),
    )


def compare(*, rounds: int, documents: int) -> int:
    with tempfile.TemporaryDirectory(prefix="emu35-bench-") as folder:
        say(f"writing {documents} documents in four formats")
        tokens = write_all(Path(folder), documents=documents)
        say(f"{tokens / 1e6:.1f}M tokens; {rounds} rounds")
        rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for number in range(rounds):
            for name in CONTENDERS:
                rates[name].append(measure(name, data=Path(folder), expected=tokens))
            say(f"round {number + 1} of {rounds} done")
        say("planning and resuming")
        own = measure_own(Path(folder), quick=documents < 20_000)
    print(f"{'contender':16}  Mtok per CPU second (median, lowest to highest)")
    for name, found in rates.items():
        spread = f"{min(found):.1f} to {max(found):.1f}"
        print(f"{name:16}  {statistics.median(found):8.1f}  {spread}")

    def ratio(other: str) -> float:
        pairs = zip(rates["emu35"], rates[other], strict=True)
        return round(statistics.median(ours / theirs for ours, theirs in pairs), 3)

    result = {
        "vs_webdataset": ratio("webdataset"),
        "vs_litdata": ratio("litdata"),
        "vs_energon": ratio("energon"),
        "vs_numpy": ratio("numpy"),
        **own,
        **{
            f"{name.replace(' ', '_')}_mtok_s": round(statistics.median(found), 1)
            for name, found in rates.items()
        },
        "documents": documents,
        "tokens": tokens,
        "rounds": rounds,
    }
    print(json.dumps(result))
    return 0


def measure(name: str, *, data: Path, expected: int) -> float:
    """Run one contender in a fresh process; its rate in millions of tokens per CPU second."""
    command = [sys.executable, __file__, "--contender", name, "--data", str(data)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"contender {name} failed; see its message above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["seen"] != expected:
        raise SystemExit(f"contender {name} read {found['seen']} tokens instead of {expected}")
    return found["timed"] / found["seconds"] / 1e6


def run_contender(name: str, *, data: Path) -> dict[str, float]:
    """Drain one contender; ``timed`` tokens of all ``seen`` took ``seconds`` of CPU time."""
    stream = CONTENDERS[name](data)
    first = next(stream)
    begin = cpu_seconds()
    timed = sum(stream)
    return {"seen": first + timed, "timed": timed, "seconds": cpu_seconds() - begin}


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def say(text: str) -> None:
    print(f"[bench] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
