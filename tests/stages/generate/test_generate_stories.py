"""Answers of several images: steps, streaming, stories, pages, and calls that are interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from tiny_source import options, rows

from emu35.cli import main
from emu35.data.story import decode_story
from emu35.inference.grammar import GridSize
from emu35.stages.generate import show
from emu35.stages.generate.options import GenerateOptions
from emu35.stages.generate.run import generate
from emu35.stages.view.sources import read_stories
from emu35.tokens.template import PromptTemplate, Task


def story(source: Path, out: Path, **changes: object) -> GenerateOptions:
    """A story of two pictures."""
    base: dict[str, object] = {
        "prompts": ["tell"],
        "task": Task.story,
        "template": PromptTemplate.official,
        "steps": 2,
    }
    return options(source, out, **(base | changes))


def test_an_answer_ends_with_its_last_step(storyteller: Path, tmp_path: Path) -> None:
    result = generate(story(storyteller, tmp_path / "out", steps=3))
    (row,) = rows(tmp_path / "out")
    assert (row["finish"], row["sizes"], result.images) == ("images", [[3, 4]] * 3, 3)
    assert row["parts"][-1] == {"image": "000_02_image.png"}
    assert row["problems"] == []


def test_an_answer_ends_where_it_says_a_stop_string(storyteller: Path, tmp_path: Path) -> None:
    vowels = ["a", "e", "i", "o", "u"]
    call = story(storyteller, tmp_path / "out", task=Task.chat, size=None, steps=None, stop=vowels)
    generate(call)
    (row,) = rows(tmp_path / "out")
    said = "".join(part["text"] for part in row["parts"] if "text" in part)
    assert row["finish"] == "stop"
    assert said[-1] in vowels
    assert not set(said[:-1]) & set(vowels)


def test_files_hold_the_same_story(storyteller: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8)
    Picture.fromarray(values).save(tmp_path / "a.png")
    out = tmp_path / "out"
    generate(story(storyteller, out, images=[tmp_path / "a.png"] * 2, image_area=72))
    (row,) = rows(out)
    stored = decode_story((out / "000_story.pb").read_bytes())
    assert stored.question == "tell"
    assert [image.image.width for image in stored.reference_images if image.image] == [12, 12]
    drawn = [image.image.image_data for image in stored.images if image.image]
    assert drawn == [(out / name).read_bytes() for name in row["images"]]
    said = "".join(part["text"] for part in row["parts"] if "text" in part)
    assert "".join(segment.asr for segment in stored.segments) == said
    page = (out / "index.html").read_text()
    assert page.count("data:image/png") >= 3
    # What another command reads back from the folder is the story that was written.
    (shown,) = read_stories(out)
    assert shown.story is not None
    assert [segment.asr for segment in shown.story.segments] == [
        segment.asr for segment in stored.segments
    ]


def test_page_and_story_can_be_left_out(storyteller: Path, tmp_path: Path) -> None:
    generate(story(storyteller, tmp_path / "out", page=False, story=False))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    (row,) = rows(tmp_path / "out")
    assert names == {*row["files"], "results.jsonl"}
    assert not any(name.endswith(".pb") for name in names)


def test_log_probabilities_of_every_token(storyteller: Path, tmp_path: Path) -> None:
    generate(story(storyteller, tmp_path / "out", logprobs=True))
    generate(story(storyteller, tmp_path / "plain"))
    (row,), (plain,) = rows(tmp_path / "out"), rows(tmp_path / "plain")
    assert row["ids"] == plain["ids"]
    assert "logprobs" not in plain
    assert len(row["logprobs"]) == len(row["forced"]) == len(row["ids"])
    free = [p for p, forced in zip(row["logprobs"], row["forced"], strict=True) if not forced]
    kept = [p for p, forced in zip(row["logprobs"], row["forced"], strict=True) if forced]
    assert max(free) <= 0
    assert min(free) < -1
    # Of each image 3*4, IMG, two EOL and EOI are forced.
    assert kept == [0.0] * (7 * 2)


def test_a_single_prompt_is_told_while_it_comes(
    storyteller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    generate(story(storyteller, out, stream=True))
    (row,) = rows(out)
    printed, log = capsys.readouterr()
    for part in row["parts"]:
        if "text" in part:
            assert part["text"].translate(show._CONTROLS).strip() in printed
    for name in row["images"]:
        assert f"3*4 codes in 0:00 -> {out / name}" in log
    assert not set(printed) & {chr(code) for code in range(32) if chr(code) not in "\n\t"}
    # The files are those of a call that shows nothing.
    generate(story(storyteller, tmp_path / "quiet"))
    assert rows(tmp_path / "quiet") == [row]
    for name in row["files"]:
        assert (tmp_path / "quiet" / name).read_bytes() == (out / name).read_bytes()


def test_a_reader_who_leaves_ends_the_printing_and_nothing_else(
    storyteller: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in ``emu35 generate --stream ... | head``, whose reader closes its end of the pipe."""
    arguments = ["generate", "--run", str(storyteller), "--task", "story", "--template", "official"]
    arguments += [
        "--size",
        "3x4",
        "--steps",
        "2",
        "--prompt",
        "tell",
        "--guidance",
        "3",
        "--stream",
    ]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
        monkeypatch.undo()
    generate(story(storyteller, tmp_path / "quiet"))
    (row,) = rows(tmp_path / "out")
    assert rows(tmp_path / "quiet") == [row]
    assert len(row["images"]) == 2
    names = {*row["files"], "index.html", "results.jsonl"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_progress_in_a_log_is_plain_lines(
    storyteller: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(show, "REPORT_SECONDS", 0.0)
    generate(story(storyteller, tmp_path / "out", prompts=["a", "b"]))
    log = capsys.readouterr().err
    assert "\r" not in log
    assert "\x1b" not in log
    assert "generate  0/2 prompts" in log
    assert "image 2 (3*4)  row 1/3  0:00 left" in log


def run_and_interrupt(arguments: list[str], *, out: Path, ready: str, kind: int) -> tuple[int, str]:
    """Start ``emu35 generate``, send ``kind`` once a file ``ready`` is there; code and messages."""
    command = [sys.executable, "-m", "emu35", "generate", *arguments, "--out", str(out)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[3],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / ready).exists():
            assert time.monotonic() < deadline, "nothing was drawn"
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(kind)
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, log


@pytest.mark.multiproc
@pytest.mark.parametrize(
    "kind", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_call_that_is_stopped_keeps_its_pictures(
    storyteller: Path, tmp_path: Path, kind: int
) -> None:
    out = tmp_path / "out"
    arguments = ["--run", str(storyteller), "--task", "story", "--template", "official"]
    # As long as the model can: it is stopped long before.
    arguments += ["--size", "3x4", "--prompt", "tell", "--precision", "fp32"]
    code, log = run_and_interrupt(arguments, out=out, ready="000_01_image.png", kind=kind)
    listed = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(listed[-1]["images"]) >= 2
    for name in [name for row in listed for name in row["images"]][:2]:
        Picture.open(out / name).load()
    (shown, *_) = read_stories(out)
    assert shown.story is not None
    assert shown.story.images
    if kind == signal.SIGKILL:
        assert listed[-1]["finish"] is None
        return
    assert (code, log.splitlines()[-1]) == (130, "emu35: stopped")
    (row,) = listed
    assert row["finish"] == "abort"
    assert {path.name for path in out.iterdir()} == {*row["files"], "index.html", "results.jsonl"}
    for name in row["images"]:
        Picture.open(out / name).load()


def test_the_size_of_a_story_may_be_the_models_choice(storyteller: Path, tmp_path: Path) -> None:
    prompts = [f"tell me {n}" for n in range(6)]
    plain = {"size": None, "template": PromptTemplate.plain, "prompts": prompts}
    generate(story(storyteller, tmp_path / "out", **plain))
    sizes = [row["sizes"] for row in rows(tmp_path / "out")]
    assert any(len(each) > 1 for each in sizes), "no story has a second picture"
    for each in sizes:
        assert each.count(each[0]) == len(each)
        assert GridSize(height=each[0][0], width=each[0][1]).image_tokens < 4096
