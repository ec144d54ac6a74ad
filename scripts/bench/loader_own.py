"""What the benchmark of loaders measures of emu35 alone, on a mixture like the paper's.

- ``plan_gtok_s``: tokens planned (drawn, packed, emitted) per CPU second, one million documents;
- ``fill``: share of the rows of that plan that holds tokens;
- ``mixture_error``: the largest distance of a source's share of tokens from its ratio over the
  first 1,000 samples;
- ``resume_s``: seconds from opening the loader to its first batch, in a fresh process, at the
  position after one million documents;
- ``state_bytes``: size of that position as JSON.

Every document that the plan emits must come exactly once an epoch; the measurement fails otherwise.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from loader_contenders import CODEBOOK, N_TEXT, ROW

Ints = npt.NDArray[np.int64]

RATIOS = {"text": 0.2, "image_text": 0.2, "video_text": 0.05, "interleaved": 0.55}
"""Stage 1 of the paper, Table 2."""


def measure_own(data: Path, *, quick: bool) -> dict[str, float]:
    """All figures; ``data`` holds emu35's shards of the benchmark."""
    documents = 100_000 if quick else 1_000_000
    return {**plan(documents=documents), **measure_resume(data, documents=documents)}


def paper_lengths(documents: int) -> dict[str, Ints]:
    """Token counts of about ``documents`` documents, the four kinds in the paper's shares of
    tokens: plain text, one captioned picture, video clips, interleaved documents."""
    rng = np.random.default_rng(0)
    sides = np.array([16, 20, 24, 28, 32, 36, 40])

    def pictures(counts: Ints) -> Ints:
        rows, columns = rng.choice(sides, size=(2, int(counts.sum())))
        ends = np.cumsum(counts)
        return np.add.reduceat(rows * (columns + 1) + 8, ends - counts)

    def text(count: int, *, mean: float, spread: float, most: int) -> Ints:
        return np.clip(rng.lognormal(mean, spread, count), 32, most).astype(np.int64)

    # Mean lengths decide how many documents of a kind give its share of the tokens.
    means = {"text": 1350.0, "image_text": 930.0, "video_text": 8300.0, "interleaved": 18600.0}
    weights = {name: RATIOS[name] / means[name] for name in RATIOS}
    count = {name: int(documents * w / sum(weights.values())) + 1 for name, w in weights.items()}
    one = np.ones(count["image_text"], np.int64)
    clips = rng.integers(4, 17, count["video_text"])
    frames = np.clip(rng.lognormal(3.0, 0.8, count["interleaved"]), 2, 28).astype(np.int64)
    return {
        "text": text(count["text"], mean=6.6, spread=1.1, most=ROW),
        "image_text": pictures(one) + text(len(one), mean=4.6, spread=0.5, most=600),
        "video_text": pictures(clips) + 150,
        "interleaved": np.minimum(pictures(frames), ROW),
    }


def plan(*, documents: int) -> dict[str, float]:
    from emu35.data.plan import Planner
    from emu35.data.planned import PlannedSource

    lengths = dict(sorted(paper_lengths(documents).items()))
    sources = [
        PlannedSource(
            name=name,
            ratio=RATIOS[name],
            length=length,
            per_shard=np.bincount(np.arange(len(length)) * 64 // len(length)),
            fingerprint=name,
        )
        for name, length in lengths.items()
    ]
    planner = Planner(
        sources=sources, sequence_length=ROW, open_bins=16, shuffle_window=4096, seed=0
    )
    total = sum(int(length.sum()) for length in lengths.values())
    began, rows = time.process_time(), []
    while len(rows) * ROW < 0.95 * total:
        rows += planner.take(448)
    seconds = time.process_time() - began
    return {
        "plan_gtok_s": round(len(rows) * ROW / seconds / 1e9, 2),
        **check_rows(rows, lengths=list(lengths.values()), ratios=[s.ratio for s in sources]),
    }


def check_rows(rows: list[Any], *, lengths: list[Ints], ratios: list[float]) -> dict[str, float]:
    """Fill and distance from the ratios; fails where a document is missing or comes twice."""
    pairs = np.array([item for row in rows for item in row.items], dtype=np.int64)
    tokens = 0
    for source, length in enumerate(lengths):
        items = pairs[pairs[:, 0] == source, 1]
        tokens += int(length[items].sum())
        times = np.bincount(items, minlength=len(length))
        # Documents waiting in open rows may be one behind, those of the epoch begun one ahead.
        if np.ptp(times) > 1:
            raise SystemExit(
                f"source {source}: documents come {times.min()} to {times.max()} times"
            )
    first = np.array([item for row in rows[:1000] for item in row.items], dtype=np.int64)
    drawn = np.array(
        [length[first[first[:, 0] == number, 1]].sum() for number, length in enumerate(lengths)]
    )
    error = np.abs(drawn / drawn.sum() - np.array(ratios)).max()
    return {
        "fill": round(tokens / (len(rows) * ROW), 5),
        "mixture_error": round(float(error), 5),
    }


def measure_resume(data: Path, *, documents: int) -> dict[str, float]:
    from emu35.data.opening import open_source, plan_source
    from emu35.data.plan import Planner
    from emu35.tokens.vocabulary import Vocabulary

    entry = open_source(
        name="bench",
        path=data / "emu35",
        vocabulary=Vocabulary(n_text=N_TEXT, codebook_size=CODEBOOK),
        limit=ROW,
    )
    planner = Planner(
        sources=[plan_source(entry, ratio=1.0)],
        sequence_length=ROW,
        open_bins=16,
        shuffle_window=4096,
        seed=0,
    )
    seen = 0
    while seen < documents:
        seen += sum(len(sample.items) for sample in planner.take(448))
    state = json.dumps(planner.state_dict())
    (data / "state.json").write_text(state)
    command = [sys.executable, str(Path(__file__).with_name("loader.py")), "--resume", str(data)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "state_bytes": len(state)}


def resume(data: Path) -> dict[str, float]:
    """Open the loader and go on from the state that lies in ``data``; called in a process of its
    own."""
    from emu35.config import SourceConfig, TokenDataConfig
    from emu35.data.loader import TokenLoader
    from emu35.tokens.vocabulary import Vocabulary

    config = TokenDataConfig(
        sequence_length=ROW, sources={"bench": SourceConfig(path=str(data / "emu35"))}
    )
    began = time.perf_counter()
    with TokenLoader(
        data=config,
        vocabulary=Vocabulary(n_text=N_TEXT, codebook_size=CODEBOOK),
        seed=0,
        global_batch_size=1,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
    ) as loader:
        loader.load_state_dict(json.loads((data / "state.json").read_text()))
        loader.next_step()
        return {"resume_s": round(time.perf_counter() - began, 3)}
