"""What is in the output folder already: an earlier call's goes, anybody else's stays."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from tiny_source import options, rows

from emu35.errors import ConfigError, DataError
from emu35.stages.generate.earlier import earlier_files
from emu35.stages.generate.interactive import interactive
from emu35.stages.generate.options import GenerateOptions
from emu35.stages.generate.run import generate
from emu35.tokens.template import PromptTemplate, Task

ROW = {"index": 0, "prompt": "x", "parts": [], "files": ["000_prompt.txt"]}
LINE = json.dumps(ROW) + "\n"


def dialogue(source: Path, out: Path) -> GenerateOptions:
    return options(
        source, out, prompts=["Go."], task=Task.explore, template=PromptTemplate.official
    )


def talk(call: GenerateOptions, *lines: str) -> None:
    typed = iter(lines)
    interactive(call, read=lambda: next(typed, None))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise AssertionError("the weights were read")

    for module in ("run", "interactive"):
        monkeypatch.setattr(f"emu35.stages.generate.{module}.load_model", unreachable)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("my notes, not JSON\n", 1),
        ("my notes", 1),
        (f"{LINE}[1]\n", 2),
        (f"{LINE}\n{LINE}", 2),
        (f"{LINE}{LINE[:30]}\n{LINE}", 2),
        ('{"id": 3, "prompt": "x", "score": 0.5}\n', 1),
        ('{"index": 3, "score": 0.', 1),
        (json.dumps(ROW | {"files": ["thesis.tex"]}) + "\n", 1),
        (json.dumps(ROW | {"files": ["../000_prompt.txt"]}) + "\n", 1),
        (json.dumps(ROW | {"files": [["000_prompt.txt"]]}) + "\n", 1),
        (json.dumps({key: ROW[key] for key in ("index", "prompt", "parts")}) + "\n", 1),
    ],
)
@pytest.mark.parametrize("start", [generate, talk])
def test_results_that_are_not_ours_keep_everything(
    run: Path, tmp_path: Path, content: str, line: int, start: Callable[[GenerateOptions], object]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.jsonl").write_text(content)
    for name in ("index.html", "story.pb", "thesis.tex", "000_prompt.txt"):
        (out / name).write_text("mine")
    before = contents(out)
    with pytest.raises(ConfigError) as caught:
        start(dialogue(run, out))
    assert f"out={out} holds files that emu35 generate did not make: line {line} of" in (
        str(caught.value)
    )
    assert "name another folder with --out, or move the files away" in str(caught.value)
    assert contents(out) == before


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("content", [None, "", LINE[:9], LINE[:40]])
def test_a_page_without_rows_is_somebody_elses(
    run: Path, tmp_path: Path, content: str | None
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if content is not None:
        (out / "results.jsonl").write_text(content)
    (out / "index.html").write_text("mine")
    (out / "story.pb").write_text("mine")
    before = contents(out)
    with pytest.raises(ConfigError, match=r"did not make: index\.html would be written over"):
        generate(options(run, out))
    with pytest.raises(ConfigError, match=r"index\.html and story\.pb would be written over"):
        talk(dialogue(run, out))
    assert contents(out) == before


def test_what_a_call_does_not_write_may_be_there(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("index.html", "story.pb"):
        (out / name).write_text("mine")
    generate(options(run, out, page=False))
    assert (out / "index.html").read_text() == (out / "story.pb").read_text() == "mine"
    assert len(rows(out)) == 3


def test_a_row_that_a_kill_has_torn_is_ours(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(options(run, out))
    content = (out / "results.jsonl").read_bytes()
    for end in (content.splitlines(keepends=True)[0] + LINE[:20].encode(), content[:-1]):
        (out / "results.jsonl").write_bytes(end)
        generate(options(run, out, prompts=["x"], story=False))
        assert len(rows(out)) == 1
        assert not (out / "000_story.pb").exists()


def test_every_file_that_generation_writes_is_known_again(
    storyteller: Path, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8)
    Picture.fromarray(values).save(tmp_path / "a.png")
    Picture.fromarray(values[:, :30]).save(tmp_path / "b.png")
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    out = tmp_path / "out"
    call = options(
        storyteller, out, prompts=["tell"], task=Task.story, template=PromptTemplate.official,
        steps=2, images=images, image_area=72,
    )  # fmt: skip
    generate(call)
    names = {path.name for path in out.iterdir()}
    assert {"000_text.txt", "000_01_image.png", "000_reference_image_1.png"} <= names
    assert names | {"story.pb"} == set(earlier_files(out, writes=["index.html"]))
    many = [f"{index}_{kind}" for index in (1000, 12345) for kind in ("text.txt", "100_image.png")]
    (out / "results.jsonl").write_text(json.dumps(ROW | {"files": many}) + "\n")
    assert set(many) < set(earlier_files(out, writes=[]))


def test_a_dialogue_of_which_every_turn_was_forgotten_can_be_held_again(
    storyteller: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    talk(dialogue(storyteller, out), "/save", "/undo")
    assert contents(out) == {"results.jsonl": b""}
    talk(dialogue(storyteller, out))
    assert len(rows(out)) == 1


def test_results_that_cannot_be_read_are_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(DataError, match=r"results\.jsonl cannot be read .* with --out"):
        generate(options(run, tmp_path))
