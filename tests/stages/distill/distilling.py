"""Calls of distillation on a tiny run, rewards of their own, and ways to look at what came out."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from emu35.data.source import Source
from emu35.inference.grammar import GridSize
from emu35.rewards.sample import Unscored
from emu35.stages.distill.options import DistillOptions
from emu35.stages.generate.options import GenerateOptions

PROMPTS = [{"prompt": f"a picture of {n}", "id": f"p{n}"} for n in range(5)]
SETTINGS: dict[str, Any] = {"samples": 2, "reward": "distilling:stopping", "keep_best": 1}
stop_after: int | None = None
"""How many scores may be given before :func:`stopping` presses Ctrl-C."""


def write_prompts(folder: Path, records: Sequence[dict[str, Any]] = PROMPTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def call(run: Path, prompts: Path, out: Path, **changes: Any) -> DistillOptions:
    """Two prompts at a time become shards; what :class:`GenerateOptions` has goes there."""
    ask = GenerateOptions(
        source=run, prompts_file=prompts, out=out, size=GridSize(height=3, width=4), guidance=3.0
    )
    own = {name for name in changes if name in GenerateOptions.__dataclass_fields__}
    own -= {"source"}
    ask = replace(ask, **{name: changes.pop(name) for name in own})
    settings: dict[str, Any] = {"source": "self", "prompts_per_shard": 2, **changes}
    return DistillOptions(ask=ask, **settings)


def brightness(record: dict[str, Any], pictures: Sequence[np.ndarray]) -> float:
    """The mean level of all pictures, in [0, 1]."""
    assert record["prompt"]
    assert all(picture.dtype == np.uint8 and picture.shape == (6, 8, 3) for picture in pictures)
    return float(np.mean([picture.mean() for picture in pictures])) / 255


def undecided(record: dict[str, Any], pictures: Sequence[np.ndarray]) -> float | Unscored:
    """:func:`brightness` that has no opinion of every other prompt."""
    if int(record["id"][1:]) % 2:
        return Unscored("no opinion")
    return brightness(record, pictures)


def stopping(record: dict[str, Any], pictures: Sequence[np.ndarray]) -> float:
    """:func:`brightness` that presses Ctrl-C some time."""
    global stop_after
    if stop_after is not None:
        stop_after -= 1
        if stop_after == 0:
            os.kill(os.getpid(), signal.SIGINT)
    return brightness(record, pictures)


def rows(out: Path, *, part: str = "") -> list[dict[str, Any]]:
    lines = (out / f"samples{part}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def results(out: Path) -> dict[str, bytes]:
    """All that a user finds in the folder."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def documents(out: Path) -> dict[str, tuple[bytes, bytes]]:
    """Id -> tokens and runs of modalities, as training reads them."""
    source = Source(name="self", path=out)
    return {
        json.loads(source.facts(number))["id"]: (words.tobytes(), runs.tobytes())
        for number in range(len(source))
        for words, runs in [source.words(number)]
    }
