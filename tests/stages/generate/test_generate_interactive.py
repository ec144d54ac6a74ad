"""Dialogues: turns, commands, and a session at a real terminal that Ctrl-C does not end."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from tiny_source import options, rows

from emu35.data.story import Story, decode_story
from emu35.errors import ConfigError
from emu35.stages.generate.interactive import check, interactive
from emu35.stages.generate.options import GenerateOptions
from emu35.stages.generate.run import generate
from emu35.tokens.template import PromptTemplate, Task, Turn


def dialogue(source: Path, out: Path, **changes: object) -> GenerateOptions:
    base: dict[str, object] = {
        "prompts": [],
        "task": Task.explore,
        "template": PromptTemplate.official,
    }
    return options(source, out, **(base | changes))


def hold(call: GenerateOptions, lines: Sequence[str]) -> list[Turn]:
    typed = iter(lines)
    return interactive(call, read=lambda: next(typed, None))


def saved(out: Path) -> Story:
    return decode_story((out / "story.pb").read_bytes())


def picture(path: Path, *, width: int = 60, height: int = 30) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Picture.fromarray(values).save(path)
    return path


def test_each_line_is_a_turn_that_sees_those_before(storyteller: Path, tmp_path: Path) -> None:
    def session(name: str, *lines: str) -> tuple[list[Turn], list[dict]]:
        turns = hold(dialogue(storyteller, tmp_path / name, logprobs=True), lines)
        return turns, rows(tmp_path / name)

    (first, second), (one, two) = session("a", "Go north.\n", "\n", "Turn left.\n")
    assert (one["prompt"], two["prompt"]) == ("Go north.", "Turn left.")
    assert (one["finish"], two["finish"]) == ("images", "images")
    assert (one["images"], two["images"]) == (["000_00_image.png"], ["001_00_image.png"])
    assert (first.answer, second.answer) == (tuple(one["ids"]), tuple(two["ids"]))
    # After another first turn the model thinks otherwise of the second.
    _, (_, other) = session("b", "Go south.\n", "Turn left.\n")
    assert other["logprobs"] != two["logprobs"]
    # The same session gives the same tokens.
    _, again = session("c", "Go north.\n", "Turn left.\n")
    assert [row["ids"] for row in again] == [one["ids"], two["ids"]]


def test_the_dialogue_is_one_story_and_one_page(storyteller: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = picture(tmp_path / "a.png")
    call = dialogue(storyteller, out, images=[path], image_area=72)
    hold(call, ["Go north.", f"/image {path}", "Turn left.", "/quit", "never read"])
    story = saved(out)
    one, two = rows(out)
    assert (story.question, len(story.reference_images)) == ("Go north.", 1)
    asked = [s for s in story.segments if s.asr.startswith("USER: ")]
    assert [(s.asr, len(s.images)) for s in asked] == [("USER: Turn left.", 1)]
    drawn = [image.image.image_data for image in story.images if image.image]
    files = [*one["images"], one["references"][0], *two["images"]]
    assert drawn == [(out / name).read_bytes() for name in files]
    assert [clip.clip_id for clip in story.clips] == [
        f"clip_{number:04d}" for number in range(len(story.clips))
    ]
    page = (out / "index.html").read_text()
    assert "Go north." in page
    assert "USER: Turn left." in page
    listed = {name for row in (one, two) for name in row["files"]}
    assert {path.name for path in out.iterdir()} == {
        *listed,
        "story.pb",
        "index.html",
        "results.jsonl",
    }


def test_commands(storyteller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, path = tmp_path / "out", picture(tmp_path / "a.png")
    lines = [
        "/undo",
        "/save",
        "/size 2x2",
        "one",
        "/size huge",
        "/size 1:1",
        "/size 3x2",
        "two",
        "/undo",
        "/image",
        f"/image {tmp_path}/gone.png",
        f"/image {path}",
        "/undo",
        "three",
        "/save",
        "/nonsense",
        "//slash",
    ]
    turns = hold(dialogue(storyteller, out, size=None, image_area=72), lines)
    log = capsys.readouterr().err
    for said in (
        "there is no turn to undo",
        "nothing was said yet",
        "size 'huge' is no grid",
        "forgot turn 2",
        "image (no name) does not exist",
        "gone.png does not exist",
        "3*6 codes, shown with the next instruction",
        "dropped the pictures that were not asked about yet",
        "/nonsense is no command; there are /image FILE",
        f"2 turns -> {out}",
        f"3 turns -> {out}",
    ):
        assert said in log
    assert [turn.question for turn in turns] == ["one", "three", "/slash"]
    assert [turn.images for turn in turns] == [()] * 3
    one, three, slash = rows(out)
    assert (one["sizes"], three["sizes"], slash["sizes"]) == ([[2, 2]], [[3, 2]], [[3, 2]])
    listed = {name for row in (one, three, slash) for name in row["files"]}
    extra = {"story.pb", "index.html", "results.jsonl"}
    assert {path.name for path in out.iterdir()} == listed | extra


def test_what_does_not_fit_is_said_and_the_session_goes_on(
    storyteller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = hold(dialogue(storyteller, tmp_path / "out"), ["x" * 5000, "/size 80x80", "short"])
    log = capsys.readouterr().err
    assert "leaves 0 of the model's positions" in log
    assert "an image of 80*80 codes has 6487 tokens" in log
    assert turns == []
    assert not (tmp_path / "out" / "story.pb").exists()


def test_a_chat_is_text_alone(
    storyteller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = dialogue(
        storyteller,
        tmp_path / "out",
        task=Task.chat,
        size=None,
        guidance=None,
        prompts=["Hello?"],
        max_new_tokens=40,
    )
    turns = hold(call, ["Really?"])
    assert [turn.question for turn in turns] == ["Hello?", "Really?"]
    assert [row["images"] for row in rows(tmp_path / "out")] == [[], []]
    assert "cut short by its length" in capsys.readouterr().err


def test_a_chat_needs_no_image_tokenizer(
    storyteller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = tmp_path / "run"
    shutil.copytree(storyteller, blind)
    config = (blind / "config.yaml").read_text()
    vision = next(line for line in config.splitlines() if line.strip().startswith("vision:"))
    (blind / "config.yaml").write_text(config.replace(vision, "  vision: ''"))
    call = dialogue(
        blind, tmp_path / "out", task=Task.chat, size=None, guidance=None, max_new_tokens=9
    )
    path = picture(tmp_path / "a.png")
    turns = hold(call, ["Hello?", f"/image {path}", "/size 3x4", "/size auto", "Really?"])
    assert [turn.images for turn in turns] == [(), ()]
    # What cannot be done is said and changes nothing: the next turn is text alone as well.
    assert [row["images"] for row in rows(tmp_path / "out")] == [[], []]
    remedy = "needs an image tokenizer, and the model names none; start again with --vision FOLDER"
    log = capsys.readouterr().err
    assert log.count(f"a picture {remedy}") == 2
    assert f"image {path} {remedy}" in log
    assert "size 3x4 from now on" not in log
    generate(replace(call, prompts=["Hello?"], out=tmp_path / "b"))
    assert len(rows(tmp_path / "b")) == 1
    with pytest.raises(ConfigError, match=r"names no image tokenizer.* with --vision FOLDER"):
        generate(replace(call, prompts=["Hello?"], steps=1, max_new_tokens=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": Task.t2i}, "task t2i is one image, which is no dialogue; use one of explore"),
        ({"prompts_file": Path("x.jsonl")}, "drop the file of prompts"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"images": [Path("gone.png")]}, "gone.png does not exist"),
    ],
)
def test_what_no_dialogue_can_be(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(dialogue(tmp_path, tmp_path / "out", **changes))


def test_a_turn_of_explore_is_one_step_unless_more_are_wished(tmp_path: Path) -> None:
    assert check(dialogue(tmp_path, tmp_path / "out")).steps == 1
    assert check(dialogue(tmp_path, tmp_path / "out", steps=3)).steps == 3
    assert check(dialogue(tmp_path, tmp_path / "out", task=Task.story)).steps is None


@dataclass
class Terminal:
    """A command at a pseudo-terminal."""

    process: subprocess.Popen[bytes]
    master: int
    screen: str = ""

    def wait_for(self, text: str, *, since: int = 0, seconds: float = 90) -> int:
        """Read until ``text`` appears behind position ``since`` of the screen; its end."""
        deadline = time.monotonic() + seconds
        while (at := self.screen.find(text, since)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {self.screen[since:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    assert text in self.screen[since:], self.screen[since:]
        return at + len(text)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


@pytest.fixture
def terminal(storyteller: Path, tmp_path: Path) -> Iterator[Terminal]:
    repository = Path(__file__).parents[3]
    command = [sys.executable, "-m", "emu35", "generate", "--run", str(storyteller)]
    command += ["--interactive", "--task", "story", "--template", "official", "--size", "3x4"]
    command += ["--out", str(tmp_path / "out")]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository), "TERM": "xterm"},
        # A suite that runs in the background of a shell hands on that it ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(slave)
    yield Terminal(process=process, master=master)
    process.kill()
    process.wait()
    os.close(master)


@pytest.mark.multiproc
def test_ctrl_c_stops_the_answer_and_keeps_the_session(terminal: Terminal, tmp_path: Path) -> None:
    out = tmp_path / "out"
    at = terminal.wait_for("> ")
    # At the prompt Ctrl-C ends nothing. Python may miss one that comes while the prompt is printed,
    # until something is typed; a person who sees no answer presses it again.
    time.sleep(0.5)
    terminal.process.send_signal(signal.SIGINT)
    try:
        at = terminal.wait_for("leaves the session", since=at, seconds=20)
    except AssertionError:
        terminal.process.send_signal(signal.SIGINT)
        at = terminal.wait_for("leaves the session", since=at)
    at = terminal.wait_for("> ", since=at)
    terminal.type("Tell me.\n")
    at = terminal.wait_for(f"-> {out / '000_00_image.png'}", since=at)
    terminal.process.send_signal(signal.SIGINT)
    at = terminal.wait_for("stopped; /undo forgets the turn", since=at)
    at = terminal.wait_for("> ", since=at)
    terminal.type("And then?\n")
    at = terminal.wait_for(f"-> {out / '001_00_image.png'}", since=at)
    terminal.process.send_signal(signal.SIGINT)
    at = terminal.wait_for("> ", since=terminal.wait_for("stopped;", since=at))
    terminal.type("\x04")  # Ctrl-D, the end of the input
    terminal.wait_for(f"2 turns -> {out}", since=at)
    assert terminal.process.wait(timeout=30) == 0
    assert [row["finish"] for row in rows(out)] == ["abort", "abort"]
    assert saved(out).question == "Tell me."
    for row in rows(out):
        assert row["images"]
        for name in row["images"]:
            Picture.open(out / name).load()
