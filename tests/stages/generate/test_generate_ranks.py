"""``emu35 generate --tp 2``: two ranks write what one process writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_source import write_run

pytestmark = pytest.mark.multiproc

CALL = ["--prompt", "one", "--prompt", "another", "--size", "2x3", "--seed", "3", "--no-stream"]


def emu35(*words: str, typed: str | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "emu35", *words],
        input=typed,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / "results.jsonl").read_text().splitlines()
    return [
        {key: row[key] for key in ("ids", "finish", "images")} for row in map(json.loads, lines)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose model two ranks can share."""
    return write_run(tmp_path_factory.mktemp("ranks"), positions=512, draws=True, kv_heads=2)


def test_two_ranks_write_what_one_process_writes(run: Path, tmp_path: Path) -> None:
    for tp in ("1", "2"):
        done = emu35("generate", "--run", str(run), "--out", str(tmp_path / tp), "--tp", tp, *CALL)
        assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "2") == rows(tmp_path / "1")
    assert len(list((tmp_path / "2").glob("*_image.png"))) == 2


@pytest.mark.slow
def test_a_dialogue_over_two_ranks(run: Path, tmp_path: Path) -> None:
    words = ["--task", "explore", "--size", "2x3", "--max-new-tokens", "60", "--guidance", "1"]
    for tp in ("1", "2"):
        done = emu35(
            *("generate", "--run", str(run), "--out", str(tmp_path / tp)),
            *("--interactive", "--tp", tp, *words),
            typed="go north\n/size nonsense\ngo east\n/quit\n",
        )
        assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "2")) == 2
    assert rows(tmp_path / "2") == rows(tmp_path / "1")


@pytest.mark.slow
def test_a_model_that_does_not_split_is_refused(run: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))
    done = emu35("generate", "--run", str(run), *out, "--tp", "3", *CALL)
    assert done.returncode == 2, done.stderr
    assert "tp=3 does not divide" in done.stderr
    assert "Traceback" not in done.stderr
