"""Distillation that is stopped or killed, and run again."""

import subprocess
import sys
from pathlib import Path

import distilling
import pytest
from distilling import SETTINGS, call, results, rows, write_prompts
from tiny_source import write_run

from emu35.errors import Interrupted
from emu35.stages.distill.run import distill

WORKER = Path(__file__).with_name("killed_worker.py")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def clean(run: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted call leaves."""
    out = tmp_path_factory.mktemp("clean") / "out"
    distill(call(run, prompts, out, **SETTINGS))
    return results(out)


@pytest.mark.parametrize(("scores", "committed"), [(1, 0), (5, 2), (7, 4)])
def test_ctrl_c_keeps_what_is_committed_and_the_rest_is_done_later(
    run: Path,
    prompts: Path,
    clean: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scores: int,
    committed: int,
) -> None:
    options = call(run, prompts, tmp_path / "out", batch_size=1, **SETTINGS)
    monkeypatch.setattr(distilling, "stop_after", scores)
    with pytest.raises(Interrupted if committed else KeyboardInterrupt) as caught:
        distill(options)
    if committed:
        assert f"stopped: {committed} of 5 prompts are done" in str(caught.value)
    assert {row["prompt"] for row in rows(tmp_path / "out")} == set(range(committed))
    again = distill(call(run, prompts, tmp_path / "out", **SETTINGS))
    assert again.skipped == committed
    assert results(tmp_path / "out") == clean


def kill_and_go_on(run: Path, prompts: Path, folder: Path, *, changes: str) -> list[int]:
    """Have the call killed, and run again, in ``folder/CHANGE`` for each of ``changes``, see the
    worker; those at which it was killed, before there was nothing left to change."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(run), str(prompts), str(folder), changes],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [int(word) for word in done.stdout.split()]


def same_as_clean(folder: Path, *, clean: dict[str, bytes]) -> int:
    """How many results below ``folder`` there are; all of them are as ``clean``."""
    outs = sorted(folder.iterdir())
    for out in outs:
        assert results(out) == clean, f"killed before change {out.name}"
        assert list(out.rglob("*.tmp")) == []
    return len(outs)


@pytest.mark.multiproc
def test_a_kill_loses_nothing_that_was_committed(
    run: Path, prompts: Path, clean: dict[str, bytes], tmp_path: Path
) -> None:
    changes = [5, 12, 18, 23, 37]
    words = ",".join(map(str, changes))
    assert kill_and_go_on(run, prompts, tmp_path / "outs", changes=words) == changes
    assert same_as_clean(tmp_path / "outs", clean=clean) == len(changes)


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_kill_at_any_change_of_the_disk_loses_nothing(
    run: Path, prompts: Path, clean: dict[str, bytes], tmp_path: Path
) -> None:
    killed = kill_and_go_on(run, prompts, tmp_path / "outs", changes="all")
    assert killed == list(range(1, len(killed) + 1))
    assert same_as_clean(tmp_path / "outs", clean=clean) == len(killed) > 40


@pytest.mark.slow
@pytest.mark.multiproc
def test_two_ranks_write_what_one_process_writes(tmp_path: Path) -> None:
    """And once all is done, a rerun of two ranks has nothing to do and ends."""
    split = write_run(tmp_path, positions=512, kv_heads=2)
    prompts = write_prompts(tmp_path / "in")
    for tp in ("1", "2", "2"):
        words = ["--run", str(split), "--out", str(tmp_path / tp), "--size", "2x3", "--tp", tp]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "emu35", "data", "distill", str(prompts)),
                *(*words, "--source", "self", "--samples", "2", "--prompts-per-shard", "3"),
            ],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert "5 prompts were done already" in done.stdout
    assert results(tmp_path / "2") == results(tmp_path / "1")
