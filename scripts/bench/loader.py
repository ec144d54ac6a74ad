"""Reading token documents: emu35 beside webdataset and litdata, on the same documents.

    python scripts/bench/loader.py [--quick] [--rounds N] [--documents N]

The work is the same for all: deliver every document once, shuffled, and copy it into rows of
32,768 int64 tokens with the number of its document beside each token. Each contender reads the
format that is natural to it: emu35 its shards (through the planner, with the checksum of every
document), webdataset tars of ``.npy`` members with ``.decode()``, litdata its own chunks, numpy one
flat file with an offset table. Each runs in a process of its own, one after the other, round by
round; a figure is the median over rounds of tokens per CPU second, children included, from the
first document on, and a ratio is the median of the ratios within a round.

``emu35 batches`` is the whole :class:`~emu35.data.loader.TokenLoader`, which also writes labels,
modality, positions and validity; nobody else does that work, so no ratio is made of it.

The last line is JSON: ``vs_webdataset`` and ``vs_litdata`` are our rate / theirs.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bench_venv import run_in_venv

REQUIREMENTS = ["webdataset>=1.0", "litdata>=0.2.50"]
INSIDE = "EMU35_BENCH_INSIDE"
ROW = 32_768
N_TEXT, CODEBOOK = 151_643, 131_072
FILES = 20

Tokens = npt.NDArray[np.uint32]


def main() -> int:
    parser = argparse.ArgumentParser(description="Document loaders compared on one set of data.")
    parser.add_argument("--quick", action="store_true", help="few documents, for a smoke test")
    parser.add_argument("--rounds", type=int, default=0, help="default 5, quick 1")
    parser.add_argument("--documents", type=int, default=0, help="default 20000, quick 2000")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if os.environ.get(INSIDE) != "1":
        os.environ[INSIDE] = "1"
        return run_in_venv(
            "loader",
            requirements=REQUIREMENTS,
            script=Path(__file__).resolve(),
            arguments=sys.argv[1:],
        )
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
        "vs_numpy": ratio("numpy"),
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


class Rows:
    """Copies documents into rows, end to end; the same for every contender."""

    def __init__(self) -> None:
        self.tokens = np.empty(ROW, np.int64)
        self.document = np.empty(ROW, np.int64)
        self.used = 0
        self.number = 0

    def add(self, tokens: Tokens) -> int:
        place = 0
        while place < len(tokens):
            count = min(len(tokens) - place, ROW - self.used)
            self.tokens[self.used : self.used + count] = tokens[place : place + count]
            self.document[self.used : self.used + count] = self.number
            place += count
            self.used = (self.used + count) % ROW
        self.number += 1
        return len(tokens)


# Contenders: each yields the token count of every document it has copied.


def read_emu35(data: Path) -> Iterator[int]:
    from emu35.data.loader import open_source, plan_source
    from emu35.data.plan import Planner
    from emu35.tokens.vocabulary import Vocabulary

    vocabulary = Vocabulary(n_text=N_TEXT, codebook_size=CODEBOOK)
    entry = open_source(name="bench", path=data / "emu35", vocabulary=vocabulary, limit=ROW)
    planner = Planner(
        sources=[plan_source(entry, ratio=1.0)],
        sequence_length=ROW,
        # With one open bin the first documents out are exactly the first epoch.
        open_bins=1,
        shuffle_window=4096,
        seed=0,
    )
    rows = Rows()
    left = len(entry.items)
    while left:
        for sample in planner.take(8):
            items = np.array([item for _, item in sample.items[:left]], dtype=np.int64)
            left -= len(items)
            for tokens, _ in entry.source.read(entry.items.document[items]):
                yield rows.add(tokens)


def read_batches(data: Path) -> Iterator[int]:
    import torch

    from emu35.config import SourceConfig, TokenDataConfig
    from emu35.data.loader import TokenLoader
    from emu35.tokens.vocabulary import Vocabulary

    torch.set_num_threads(1)
    total = int(np.load(data / "offsets.npy")[-1])
    config = TokenDataConfig(
        sequence_length=ROW, sources={"bench": SourceConfig(path=str(data / "emu35"))}
    )
    with TokenLoader(
        data=config,
        vocabulary=Vocabulary(n_text=N_TEXT, codebook_size=CODEBOOK),
        seed=0,
        global_batch_size=8,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
    ) as loader:
        # Rows are nearly full; counting their columns until the total is reached is one epoch.
        while total:
            for _ in loader.next_step():
                count = min(ROW, total)
                total -= count
                yield count
                if not total:
                    break


def read_webdataset(data: Path) -> Iterator[int]:
    webdataset: Any = import_module("webdataset")

    rows = Rows()
    shards = sorted(str(path) for path in (data / "webdataset").glob("*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=FILES, seed=0, empty_check=False)
    for (tokens,) in dataset.shuffle(1000).decode().to_tuple("npy"):
        yield rows.add(tokens)


def read_litdata(data: Path) -> Iterator[int]:
    litdata: Any = import_module("litdata")

    rows = Rows()
    for sample in litdata.StreamingDataset(str(data / "litdata"), shuffle=True, seed=0):
        yield rows.add(sample["tokens"])


def read_numpy(data: Path) -> Iterator[int]:
    rows = Rows()
    offsets = np.load(data / "offsets.npy")
    tokens = np.memmap(data / "tokens.bin", np.uint32, "r")
    for document in np.random.default_rng(0).permutation(len(offsets) - 1):
        yield rows.add(tokens[offsets[document] : offsets[document + 1]])


CONTENDERS: dict[str, Callable[[Path], Iterator[int]]] = {
    "emu35": read_emu35,
    "webdataset": read_webdataset,
    "litdata": read_litdata,
    "numpy": read_numpy,
    "emu35 batches": read_batches,
}


# The same documents in each format.


def write_all(folder: Path, *, documents: int) -> int:
    """Write 200 to 4000 random tokens a document, in every format; the number of tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(200, 4001, size=documents)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(0, N_TEXT, size=offsets[-1], dtype=np.uint32)
    np.save(folder / "offsets.npy", offsets)
    tokens.tofile(folder / "tokens.bin")
    parts = [tokens[a:b] for a, b in pairwise(offsets.tolist())]
    for write in (write_emu35, write_webdataset, write_litdata):
        write(folder, parts)
    return int(offsets[-1])


def write_emu35(folder: Path, parts: list[Tokens]) -> None:
    from emu35.data.shards import ShardMeta
    from emu35.data.writer import ShardWriter
    from emu35.tokens.serialize import TokenSequence

    meta = ShardMeta(source="bench", kind="emu35", n_text=N_TEXT, codebook_size=CODEBOOK)
    size = sum(part.nbytes for part in parts) // FILES
    with ShardWriter(folder=folder / "emu35", meta=meta, shard_bytes=size) as writer:
        for number, part in enumerate(parts):
            modality = np.zeros(len(part), np.uint8)
            writer.append(TokenSequence(part, modality), document_id=str(number))


def write_webdataset(folder: Path, parts: list[Tokens]) -> None:
    webdataset: Any = import_module("webdataset")

    (folder / "webdataset").mkdir()
    per_file = -(-len(parts) // FILES)
    pattern = str(folder / "webdataset" / "%05d.tar")
    with webdataset.ShardWriter(pattern, maxcount=per_file, verbose=0) as writer:
        for number, part in enumerate(parts):
            writer.write({"__key__": f"{number:08d}", "npy": part})


def write_litdata(folder: Path, parts: list[Tokens]) -> None:
    litdata: Any = import_module("litdata")

    target = folder / "litdata"
    shutil.rmtree(target, ignore_errors=True)
    litdata.optimize(
        fn=as_litdata_sample,
        inputs=[(str(folder), number) for number in range(len(parts))],
        output_dir=str(target),
        chunk_bytes="16MB",
        num_workers=1,
        verbose=False,
    )


def as_litdata_sample(entry: tuple[str, int]) -> dict[str, Tokens]:
    """Called in litdata's own worker, hence found by name and reading from the files."""
    folder, number = entry
    offsets = np.load(f"{folder}/offsets.npy", mmap_mode="r")
    tokens = np.memmap(f"{folder}/tokens.bin", np.uint32, "r")
    return {"tokens": np.array(tokens[offsets[number] : offsets[number + 1]])}


def say(text: str) -> None:
    print(f"[bench] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
