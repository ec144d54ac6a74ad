"""The demo at a budget that learns nothing: every step, the same code, the same commands."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("skimage", reason="the extra 'demo' is not installed")

PROMISED = [
    "seconds",
    "colour_accuracy",
    "shape_accuracy",
    "colour_chance",
    "shape_chance",
    "release_logits_equal",
]
STEPS = ["corpus", "tokenizer", "ingest", "pretrain", "generate", "tasks", "sft", "lora"]
STEPS += ["answer", "dida", "compare", "grpo", "judge", "release", "report"]


def start(out: Path, *arguments: str, repository: Path, cwd: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            sys.executable,
            str(repository / "scripts" / "demo" / "run.py"),
            str(out),
            "--budget",
            "tiny",
            *arguments,
        ],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )


def run(out: Path, *arguments: str, repository: Path, cwd: Path) -> tuple[int, str]:
    process = start(out, *arguments, repository=repository, cwd=cwd)
    text, _ = process.communicate()
    return process.returncode, text


@pytest.mark.timeout(900)
def test_every_step_in_two_attempts(tmp_path: Path, repository: Path) -> None:
    out = tmp_path / "out"
    # A signal in the middle of a command: whatever the moment, the demo ends as "stopped" ...
    process = start(out, repository=repository, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (out / ".steps" / "corpus.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate()
    assert process.returncode == 75, text
    assert "the same command goes on" in text
    assert not (out / "summary.json").exists()

    # ... and the same command goes on to the end.
    code, text = run(out, repository=repository, cwd=tmp_path)
    assert code == 0, text
    assert "$ emu35 run experiment=demo/ibq" in text
    assert "$ emu35 convert verify" in text
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary)[: len(PROMISED)] == PROMISED
    assert summary["release_logits_equal"] is True
    verification = json.loads((out / "verification.json").read_text())
    assert verification["logits_equal"] is True
    assert verification["tensors_compared"] > 0
    assert "weights" in text, "the report of the verification is shown"
    assert 0 <= summary["colour_accuracy"] <= 1
    assert all(not isinstance(value, dict | list) for value in summary.values())
    times = [summary[f"seconds_{step}"] for step in STEPS]
    assert summary["seconds"] == pytest.approx(sum(times), abs=0.5)

    for model in ("pretrain", "sft", "lora"):
        assert 0 <= summary[f"tasks_{model}"] <= 1
    asked = json.loads((out / "tasks.json").read_text())
    assert {prompt["task"] for prompt in asked["prompts"]} == {"t2i", "x2i", "story", "chat"}
    assert {len(found["answers"]) for found in asked["models"].values()} == {4}
    adapters = (out / "lora" / "config.yaml").read_text()
    assert "adapter: lora" in adapters

    # A model that knows nothing says words until its budget ends, and may not draw at all.
    assert 0 < summary["kinetic_euler_2_forwards"] <= summary["ar_forwards"]
    assert len(list((out / "dida_eval" / "samples").iterdir())) == 4

    # Two steps on held-out and training prompts of both kinds, judged by programs.
    for task in ("wishes", "words", "captions"):
        assert 1 <= summary[f"grpo_reward_{task}_before"] <= 10
        assert 1 <= summary[f"grpo_reward_{task}_after"] <= 10
    for task in ("wishes", "words"):
        assert 0 <= summary[f"grpo_{task}_whole_after"] <= summary[f"grpo_{task}_after"] <= 1
    assert (out / "grpo" / "samples").is_dir()

    page = (out / "report.html").read_text()
    assert "Mean reward, 1 to 10" in page
    assert "adapters alone" in page
    assert "in 2 steps" in page
    assert page.count("data:image/png;base64,") >= 2
    assert "<polyline" in page
    assert "http://" not in page
    assert "https://" not in page

    # A third time there is nothing left to do, and the figures stay as they are.
    code, text = run(out, repository=repository, cwd=tmp_path)
    assert code == 0, text
    assert "$ emu35" not in text
    assert json.loads((out / "summary.json").read_text()) == summary


def test_a_folder_of_another_budget_is_refused(tmp_path: Path, repository: Path) -> None:
    code, text = run(tmp_path / "out", "--until", "corpus", repository=repository, cwd=tmp_path)
    assert code == 0, text
    assert (tmp_path / "out" / "corpus" / "scenes" / "train-00000.tar").exists()
    code, text = run(tmp_path / "out", "--budget", "default", repository=repository, cwd=tmp_path)
    assert code == 2
    assert "holds a demo with another budget" in text
    assert "Traceback" not in text


def test_a_step_that_does_not_exist_is_refused_with_those_that_do(
    tmp_path: Path, repository: Path
) -> None:
    code, text = run(tmp_path / "out", "--until", "judges", repository=repository, cwd=tmp_path)
    assert code == 2
    assert "--until judges" in text
    assert all(step in text for step in STEPS)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "out").write_text("mine")
    code, text = run(tmp_path / "out", repository=repository, cwd=tmp_path)
    assert code == 2
    assert "is a file" in text
    assert (tmp_path / "out").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, text = run(tmp_path / "file" / "out", repository=repository, cwd=tmp_path)
    assert code == 2
    (line,) = text.splitlines()
    assert line.startswith("demo: ")
    assert str(tmp_path / "file" / "out") in line
    assert "Not a directory" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_there_are_as_many_prompts_as_every_budget_asks_for(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(repository / "scripts" / "demo")
    from budget import BUDGETS
    from emu35.data.scenes.corpus import sample_word_prompts
    from emu35.data.scenes.words import Words

    for budget in BUDGETS.values():
        sample_word_prompts(count=budget.grpo_prompts, seed=7, use=Words.practised)
        sample_word_prompts(count=budget.grpo_heldout, seed=7, use=Words.held_out)


@pytest.mark.parametrize("equal", [True, False])
def test_the_summary_says_what_the_verification_found(
    equal: bool, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(repository / "scripts" / "demo")
    from summary import summarize

    scores = {"colour": 0.5, "shape": 0.5, "place": 0.5, "size": 0.5, "count": 0.5}
    summary = summarize(
        {"accuracy": scores, "chance": scores, "prompts": []},
        tasks={
            "models": {"pretrain": {"accuracy": {"mean": 0.25}}},
            "chance": {"mean": 0.125},
        },
        parallel={"ar_accuracy": 0.75},
        rewarded={"grpo_words_after": 0.625},
        verification={"logits_equal": equal, "max_difference": 0.0 if equal else 0.25},
        seconds={"corpus": 1.0},
        budget="tiny",
    )
    assert list(summary)[: len(PROMISED)] == PROMISED
    assert summary["release_logits_equal"] is equal
    assert summary["tasks_pretrain"] == 0.25
    assert (summary["ar_accuracy"], summary["grpo_words_after"]) == (0.75, 0.625)
