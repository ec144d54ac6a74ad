"""Generation by emu35 beside Hugging Face transformers' ``generate``, in one run.

    python scripts/bench/generate.py [--quick] [--threads N] [--rounds N] [--no-server]

The same weights (8 layers of 256, the released vocabulary of 282,926 ids, fp32), the same greedy
tokens: guided pictures of 16 x 16 codes. The other side is ``generate_hf.py``: transformers with
the grammar and guidance as a logits processor, which keeps a second stream with a cache of its own.
All tokens must agree, else the script fails rather than compare different work. Contestants take
turns; every figure is the median of the ratios within a round.

- ``single_speedup``: HF's time / ours for one picture.
- ``batch8_speedup``: HF's time / ours for eight pictures of ragged prompts, HF one by one as the
  official code does (it knows no batch); ``batch8_speedup_batched`` with HF's eight as one
  left-padded batch, both streams batched.
- ``server_speedup``: throughput of 64 mixed requests through the HTTP server at once / one by one;
  ``server_failures`` must be 0.
- ``text_vocabulary_ratio``: time of a visual token with 151,643 text ids / with 256.
- ``forced_rows``: projections made for forced tokens.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_venv import run_in_venv

if TYPE_CHECKING:
    from generate_hf import Picture

    from emu35.inference.engine import Engine
    from emu35.model.transformer import Emu35Model
    from emu35.tokens.text import TextTokenizer

REQUIREMENTS = ["transformers>=5.0"]
INSIDE = "EMU35_BENCH_INSIDE"
GUIDANCE, GRID = 3.0, (16, 16)
SERVED_AT_ONCE = 32
CAPTIONS = (
    "a red circle",
    "two",
    "a blue square to the left of a small green triangle, on white",
    "mountains at dawn, oil painting",
    "a",
    "three yellow stars above a house",
    "the same picture again, but at night and with rain",
    "a cat",
)

Work = Callable[[], list[list[int]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small pictures, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--no-server", action="store_true", help="leave the HTTP server out")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} must be at least 1")
    if os.environ.get(INSIDE) != "1":
        os.environ[INSIDE] = "1"
        return run_in_venv(
            "generate",
            requirements=REQUIREMENTS,
            script=Path(__file__).resolve(),
            arguments=sys.argv[1:],
        )
    return compare(options)


def compare(options: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore")
    import generate_hf
    import torch
    import transformers

    if options.threads:
        torch.set_num_threads(options.threads)
    rounds, grid = (1, (4, 6)) if options.quick else (options.rounds, GRID)
    tokenizer = large_tokenizer()
    model = build(tokenizer)
    pictures = [picture(caption, grid=grid, tokenizer=tokenizer) for caption in CAPTIONS]
    hf = generate_hf.hf_model(model)

    def theirs(many: Callable[..., list[list[int]]], chosen: Sequence["Picture"]) -> Work:
        return lambda: many(hf, pictures=chosen, tokenizer=tokenizer)

    one_by_one, batched = generate_hf.pictures_one_by_one, generate_hf.pictures_batched
    single = race(
        {"emu35": ours(model, pictures[:1]), "HF": theirs(one_by_one, pictures[:1])},
        title=f"one picture of {grid[0]} x {grid[1]} codes",
        rounds=rounds,
    )
    batch = race(
        {
            "emu35": ours(model, pictures),
            "HF one by one": theirs(one_by_one, pictures),
            "HF batch": theirs(batched, pictures),
        },
        title=f"eight pictures of {grid[0]} x {grid[1]} codes",
        rounds=rounds,
    )
    found: dict[str, Any] = {
        "single_speedup": single["HF"],
        "batch8_speedup": batch["HF one by one"],
        "batch8_speedup_batched": batch["HF batch"],
        "text_vocabulary_ratio": text_vocabulary_ratio(model, pictures[0], rounds=rounds),
        "forced_rows": forced_rows(model, pictures[0]),
    }
    if not options.no_server:
        found |= through_the_server(model, tokenizer, quick=options.quick)
    print(
        json.dumps(
            found
            | {
                "rounds": rounds,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "threads": torch.get_num_threads(),
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            }
        )
    )
    return 0


def large_tokenizer(n_text: int | None = None) -> "TextTokenizer":
    """Bytes for text, in a vocabulary laid out as the released one is: its table is not needed to
    measure, and may not be at hand."""
    from emu35.tokens.text import ByteTokenizer
    from emu35.tokens.vocabulary import Vocabulary

    vocabulary = Vocabulary(n_text=n_text or 151_643, codebook_size=131_072)
    return ByteTokenizer(vocabulary=vocabulary)


def build(tokenizer: "TextTokenizer") -> "Emu35Model":
    from generate_hf import MODEL

    from emu35.model.build import build_model
    from emu35.model.init import initialize
    from emu35.parallel.mesh import single_process_mesh

    single_process_mesh()
    model = build_model(MODEL, vocabulary_size=tokenizer.vocabulary.size)
    initialize(model, seed=3, pad_id=tokenizer.vocabulary.pad)
    return model.eval().requires_grad_(False)


def picture(caption: str, *, grid: tuple[int, int], tokenizer: "TextTokenizer") -> "Picture":
    from generate_hf import Picture

    from emu35.tokens.template import Task, build_prompt

    prompt = build_prompt(Task.t2i, caption, tokenizer=tokenizer)
    return Picture(
        prompt=prompt.conditional,
        unconditional=prompt.unconditional,
        height=grid[0],
        width=grid[1],
        guidance=GUIDANCE,
    )


def ours(model: "Emu35Model", pictures: Sequence["Picture"]) -> Work:
    """Our side of the comparison, the making of the engine and its cache included."""

    def work() -> list[list[int]]:
        engine = filled(model, pictures)
        return [answer.ids for answer in engine.run()]

    return work


def filled(model: "Emu35Model", pictures: Sequence["Picture"]) -> "Engine":
    """An engine that the pictures were submitted to."""
    from emu35.inference.engine import Engine
    from emu35.inference.grammar import GrammarOptions, GridSize
    from emu35.inference.request import Request
    from emu35.tokens.template import Sampling

    tokenizer = large_tokenizer(model.vocabulary_size - 131_072 - 211)
    requests = [
        Request(
            prompt=each.prompt,
            unconditional=each.unconditional,
            grammar=GrammarOptions(
                size=GridSize(height=each.height, width=each.width), open_image=True
            ),
            visual=Sampling(temperature=0.0, top_k=0, top_p=1.0),
            guidance=each.guidance,
            max_new_tokens=GridSize(height=each.height, width=each.width).image_tokens,
            max_images=1,
        )
        for each in pictures
    ]
    engine = Engine(
        model=model,
        tokenizer=tokenizer,
        max_length=max(request.slots for request in requests),
        max_requests=len(requests),
    )
    for request in requests:
        engine.submit(request)
    return engine


def race(contestants: dict[str, Work], *, title: str, rounds: int) -> dict[str, float]:
    """Time the contestants in turns; the median over rounds of each one's time / ours.

    Raises:
        SystemExit: their tokens differ.
    """
    from generate_hf import first_difference

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, list[list[int]]] = {}
    for done in range(rounds):
        for name, work in contestants.items():
            began = time.perf_counter()
            answers[name] = work()
            seconds[name].append(time.perf_counter() - began)
        for name, theirs in answers.items():
            if difference := first_difference(answers["emu35"], theirs=theirs):
                raise SystemExit(f"{title}: emu35 and {name} differ: {difference}")
        say(f"{title}: round {done + 1}/{rounds}")
    tokens = sum(len(answer) for answer in answers["emu35"])
    print(f"{title:44} {'s':>8} {'tokens/s':>9}")
    for name, times in seconds.items():
        print(
            f"  {name:42} {statistics.median(times):8.2f} {tokens / statistics.median(times):9.1f}"
        )
    return {
        name: round(
            statistics.median(
                theirs / own for theirs, own in zip(times, seconds["emu35"], strict=True)
            ),
            2,
        )
        for name, times in seconds.items()
    }


def text_vocabulary_ratio(model: "Emu35Model", one: "Picture", *, rounds: int) -> float:
    """Time of a picture with the released text vocabulary / with one of 256 ids."""
    small_tokenizer = large_tokenizer(256)
    small = build(small_tokenizer)
    prompt = picture(CAPTIONS[0], grid=(one.height, one.width), tokenizer=small_tokenizer)
    ratios: list[float] = []
    for _ in range(max(3, rounds)):
        seconds: list[float] = []
        for which, asked in ((model, one), (small, prompt)):
            engine = filled(which, [asked])
            engine.step()  # the prompt, which is the same for both
            began = time.perf_counter()
            engine.run()
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
    return round(statistics.median(ratios), 2)


def through_the_server(
    model: "Emu35Model", tokenizer: "TextTokenizer", *, quick: bool
) -> dict[str, Any]:
    """Throughput of mixed calls at once / one by one, and how many failed."""
    from serve_load import measure, serving, speaking

    from emu35.inference.engine import Engine

    def make_engine() -> Engine:
        return Engine(
            model=model,
            tokenizer=speaking(tokenizer),
            max_length=2048,
            max_requests=SERVED_AT_ONCE,
            max_waiting=256,
        )

    with serving(make_engine, tokenizer=speaking(tokenizer), max_length=2048) as url:
        measured = measure(url, quick=quick)
    return {name: measured[name] for name in ("server_speedup", "server_failures")}


def forced_rows(model: "Emu35Model", one: "Picture") -> int:
    """Projections beyond one a chosen token."""
    engine = filled(model, [one])
    engine.run()
    stats = engine.stats
    projected = stats.projected_visual + stats.projected_text + stats.projected_digits
    return projected - (stats.tokens_generated - stats.forced)


def say(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
