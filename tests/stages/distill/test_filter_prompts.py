"""Prompts by difficulty: rates of real answers, thresholds that cost nothing, stops and reruns."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import distilling
import numpy as np
import pytest
from distilling import PROMPTS, write_prompts
from PIL import Image

from emu35.cli import main
from emu35.data.ingest.options import Existing
from emu35.errors import ConfigError, DataError, Interrupted
from emu35.inference.grammar import GridSize
from emu35.rewards.sample import Unscored
from emu35.stages.distill.rates import FilterOptions, filter_prompts
from emu35.stages.generate.options import GenerateOptions

stop_after: int | None = None
judged = 0


def telling(record: dict[str, Any], pictures: Sequence[np.ndarray]) -> float | Unscored:
    """p0 never passes, p1 always, p2 is never judged, the rest by brightness."""
    global judged, stop_after
    judged += 1
    if stop_after is not None:
        stop_after -= 1
        if stop_after == 0:
            os.kill(os.getpid(), signal.SIGINT)
    fixed: dict[str, float | Unscored] = {"p0": -1.0, "p1": 2.0, "p2": Unscored("no opinion")}
    return fixed.get(record["id"], distilling.brightness(record, pictures))


def options(run: Path, prompts: Path, out: Path, **changes: Any) -> FilterOptions:
    ask = GenerateOptions(
        source=run, prompts_file=prompts, out=out, size=GridSize(height=3, width=4), batch_size=4
    )
    settings: dict[str, Any] = {
        "reward": "test_filter_prompts:telling",
        "pass_at": 0.5,
        "samples": 4,
        "prompts_per_commit": 2,
        **changes,
    }
    return FilterOptions(ask=ask, **settings)


def rates(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rates.jsonl").read_text().splitlines()]


def kept(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "kept.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


def test_what_is_too_hard_too_easy_or_unjudged_is_left_out_and_counted(
    run: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = filter_prompts(options(run, prompts, tmp_path / "out", low=0.0, high=1.0))
    assert first.kept == 4
    by = {row["id"].split()[1]: row for row in rates(tmp_path / "out")}
    assert (by["p0"]["rate"], by["p1"]["rate"], by["p2"]["rate"]) == (0.0, 1.0, None)
    assert (by["p2"]["unscored"], by["p2"]["why"]) == (4, "no answer has a score")
    # Between the answers' brightnesses, so that some of them pass.
    middle = (by["p3"]["least"] + by["p3"]["best"]) / 2
    before = judged
    capsys.readouterr()
    summary = filter_prompts(
        options(run, prompts, tmp_path / "out", pass_at=middle, low=0.05, high=0.95)
    )
    assert judged == before, "other thresholds sample nothing again"
    assert summary.skipped == 5
    by = {row["id"].split()[1]: row for row in rates(tmp_path / "out")}
    assert 0 < by["p3"]["rate"] < 1
    assert by["p3"]["rate"] == by["p3"]["passed"] / 4
    assert by["p3"]["kept"]
    assert by["p0"]["why"].startswith("too hard")
    assert by["p1"]["why"].startswith("too easy")
    expected = [record for record in PROMPTS if by[record["id"]]["kept"]]
    assert kept(tmp_path / "out") == expected
    said = capsys.readouterr().out
    for part in (
        f"5 prompts, 20 answers, {summary.lines()[0].split(', ')[2]}",
        "5 prompts were answered already",
        "left out: 1 x no answer has a score",
        "4 answers could not be judged, and do not count",
    ):
        assert part in said


def test_stopped_and_run_again_leaves_what_an_uninterrupted_call_leaves(
    run: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, cut = tmp_path / "clean", tmp_path / "cut"
    filter_prompts(options(run, prompts, clean, high=1.0))
    import test_filter_prompts as named  # what the reward's name imports

    monkeypatch.setattr(named, "stop_after", 10)
    with pytest.raises(Interrupted, match="of 5 prompts are done"):
        filter_prompts(options(run, prompts, cut, high=1.0))
    monkeypatch.setattr(named, "stop_after", None)
    assert not (cut / "kept.jsonl").exists()
    summary = filter_prompts(options(run, prompts, cut, high=1.0))
    assert 0 < summary.skipped < 5
    for name in ("rates.jsonl", "kept.jsonl"):
        assert (cut / name).read_bytes() == (clean / name).read_bytes()
    with pytest.raises(DataError, match="samples was 4 and is 2"):
        filter_prompts(options(run, prompts, cut, samples=2))
    again = filter_prompts(
        options(run, prompts, cut, samples=2, high=1.0, existing=Existing.replace)
    )
    assert {rate.samples for rate in again.rates} == {2}


def test_answers_cut_short_do_not_pass(run: Path, tmp_path: Path) -> None:
    path = write_prompts(tmp_path, [{"prompt": "short", "task": "story", "max_new_tokens": 3}])
    plain = options(run, path, tmp_path / "out", low=0.0)
    plain.ask.size = None
    filter_prompts(plain)
    (row,) = rates(tmp_path / "out")
    assert (row["incomplete"], row["rate"], row["mean"]) == (4, 0.0, None)


def test_kept_records_still_find_their_pictures(run: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "in" / "sub" / "cat.png")
    record = {"prompt": "paint it", "id": "p1", "task": "x2i", "images": ["sub/cat.png"]}
    path = write_prompts(tmp_path / "in", [record])
    wanted = options(run, path, tmp_path / "out", high=1.0)
    wanted.ask.image_area = 16
    filter_prompts(wanted)
    (found,) = kept(tmp_path / "out")
    assert found == {**record, "images": ["../in/sub/cat.png"]}
    assert (tmp_path / "out" / found["images"][0]).is_file()


def test_thresholds_that_make_no_sense_and_nothing_kept(
    run: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"low=0.6 and high=0.4 must be shares"):
        filter_prompts(options(run, prompts, tmp_path / "out", low=0.6, high=0.4))
    with pytest.raises(DataError, match=r"none of 5 has a pass rate in \[0.3, 0.4\]"):
        filter_prompts(options(run, prompts, tmp_path / "out", low=0.3, high=0.4, pass_at=1.5))
    assert len(rates(tmp_path / "out")) == 5


def test_the_command_keeps_prompts(run: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = main(
        [
            *("data", "filter-prompts", str(prompts), "--run", str(run), "--out", str(out)),
            *("--reward", "test_filter_prompts:telling", "--pass-at", "0.5", "--samples", "2"),
            *("--low", "0", "--high", "1", "--size", "3x4"),
        ]
    )
    assert code == 0
    assert [record["id"] for record in kept(out)] == ["p0", "p1", "p3", "p4"]
