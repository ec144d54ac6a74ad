"""Generation from folders on disk, with a tiny model of random weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from tiny_source import CODES, PROMPTS, options, rows
from tiny_vision import write_tiny_ibq

from emu35.errors import CheckpointError, ConfigError, DataError
from emu35.inference.ask import SamplingOverride, parse_size, prompt_seed
from emu35.inference.grammar import GridSize
from emu35.stages.generate import files as files_module
from emu35.stages.generate.interactive import interactive
from emu35.stages.generate.run import generate
from emu35.stages.release import ExportOptions, export
from emu35.tokens.template import PromptTemplate, Task


def test_every_prompt_becomes_a_picture_of_the_wished_size(run: Path, tmp_path: Path) -> None:
    result = generate(options(run, tmp_path / "out"))
    assert (len(result.answers), result.images, result.problems) == (3, 3, [])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(
        [f"{i:03d}_00_image.png" for i in range(3)]
        + [f"{i:03d}_prompt.txt" for i in range(3)]
        + [f"{i:03d}_story.pb" for i in range(3)]
        + ["index.html", "results.jsonl"]
    )
    for index, row in enumerate(rows(tmp_path / "out")):
        assert row["prompt"] == PROMPTS[index]
        assert row["sizes"] == [[3, 4]]
        assert row["parts"] == [{"image": f"{index:03d}_00_image.png"}]
        picture = Picture.open(tmp_path / "out" / row["images"][0])
        assert picture.size == (8, 6)
        assert (tmp_path / "out" / f"{index:03d}_prompt.txt").read_text() == PROMPTS[index] + "\n"


def test_the_seed_and_not_the_batch_size_decides(run: Path, tmp_path: Path) -> None:
    def ids(name: str, **changes: object) -> list[list[int]]:
        return [a.ids for a in generate(options(run, tmp_path / name, **changes)).answers]

    together = ids("a", batch_size=3, seed=4)
    assert ids("b", batch_size=1, seed=4) == together
    assert ids("c", batch_size=3, seed=5) != together
    # A prompt's place, not the other prompts, decides with the seed.
    assert ids("d", prompts=PROMPTS[:2], seed=4) == together[:2]


def test_a_release_generates_what_its_run_does(run: Path, tmp_path: Path) -> None:
    export(ExportOptions(run=run, out=tmp_path / "release"), message=lambda _: None)
    from_run = generate(options(run, tmp_path / "a"))
    from_release = generate(options(tmp_path / "release", tmp_path / "b"))
    assert [a.ids for a in from_release.answers] == [a.ids for a in from_run.answers]
    for index in range(len(PROMPTS)):
        name = f"{index:03d}_00_image.png"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_greedy_ignores_the_seed(run: Path, tmp_path: Path) -> None:
    cold = SamplingOverride(temperature=0.0)
    first, second = (
        [a.ids for a in generate(options(run, tmp_path / str(s), visual=cold, seed=s)).answers]
        for s in (1, 2)
    )
    assert first == second


def test_a_second_call_leaves_nothing_of_the_first(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(options(run, out))
    (out / "mine.txt").write_text("kept")
    generate(options(run, out, prompts=PROMPTS[:1]))
    assert sorted(path.name for path in out.iterdir()) == [
        "000_00_image.png",
        "000_prompt.txt",
        "000_story.pb",
        "index.html",
        "mine.txt",
        "results.jsonl",
    ]


@pytest.mark.parametrize("written", [0, 1, 4])
def test_nothing_of_a_killed_call_survives_the_next(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """Killed as by SIGKILL, after so many files: no clean-up runs."""
    out, files = tmp_path / "out", []

    class Killed(BaseException):
        pass

    def put(path: Path, *, content: bytes) -> None:
        if len(files) == written:
            raise Killed
        files.append(path)
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "write_output", put)
        patch.setattr(files_module.GeneratedFiles, "finish", lambda _: None)
        with pytest.raises(Killed):
            generate(options(run, out, batch_size=1))
    assert len(files) == written
    # A story has no file of the name that every picture of the killed call has.
    story = options(
        run, out, prompts=["tell"], task=Task.story, template=PromptTemplate.official,
        size=None, max_new_tokens=5,
    )  # fmt: skip
    generate(story)
    (row,) = rows(out)
    assert {path.name for path in out.iterdir()} == {*row["files"], "index.html", "results.jsonl"}
    assert row["images"] == []


def test_rows_are_there_before_the_call_ends(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module.GeneratedFiles, "finish", lambda _: None)
    generate(options(run, tmp_path / "out", batch_size=2))
    assert sorted(row["index"] for row in rows(tmp_path / "out")) == [0, 1, 2]
    for row in rows(tmp_path / "out"):
        assert all((tmp_path / "out" / name).exists() for name in row["files"])


def test_text_tasks_write_text_and_name_what_was_cut(run: Path, tmp_path: Path) -> None:
    result = generate(
        options(
            run,
            tmp_path / "out",
            task=Task.story,
            template=PromptTemplate.official,
            prompts=["tell"],
            max_new_tokens=60,
        )
    )
    (row,) = rows(tmp_path / "out")
    assert row["finish"] in ("length", "eos")
    assert len(row["ids"]) == result.tokens <= 60
    text = [part["text"] for part in row["parts"] if "text" in part]
    assert text, "pick another seed: this answer has no text"
    assert (tmp_path / "out" / "000_text.txt").exists()
    assert result.problems == [f"prompt 0: {problem}" for problem in row["problems"]]


def test_references_decide_the_size(run: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8)
    Picture.fromarray(values).save(tmp_path / "reference.png")
    generate(
        options(
            run,
            tmp_path / "out",
            task=Task.x2i,
            images=[tmp_path / "reference.png"],
            image_area=72,
            size=None,
        )
    )
    # 72 pixels at 2:1 are 6 x 12, in codes of 2 x 2 pixels 3 x 6.
    assert [row["sizes"] for row in rows(tmp_path / "out")] == [[[3, 6]]] * 3


@pytest.mark.parametrize("area", [3, 1025, 10**12])
def test_an_area_that_no_reference_can_have_is_refused_before_it_is_read(
    run: Path, tmp_path: Path, area: int
) -> None:
    (tmp_path / "broken.png").write_bytes(b"never read")
    call = options(
        run, tmp_path / "out", task=Task.x2i, images=[tmp_path / "broken.png"], image_area=area
    )
    # A code is 2 x 2 pixels, and the model has 256 positions.
    for start in (generate, lambda call: interactive(replace(call, task=Task.story, prompts=[]))):
        with pytest.raises(ConfigError, match=rf"image_area={area} must lie in 4\.\.1024 pixels"):
            start(call)
    assert not (tmp_path / "out").exists()


def test_a_broken_reference_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    with pytest.raises(DataError, match=r"broken\.png"):
        generate(options(run, tmp_path / "out", task=Task.x2i, images=[tmp_path / "broken.png"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["good", "  "]}, "prompt 1: the prompt is empty"),
        ({"size": None, "ratio": "7:5"}, "'7:5' is unknown; use one of 4:3"),
        ({"ratio": "1:1"}, "give one of them"),
        ({"images": [Path("nowhere.png")]}, "nowhere.png does not exist"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"visual": SamplingOverride(top_k=-1)}, "image top-k -1"),
        ({"text": SamplingOverride(temperature=-0.5)}, "text temperature -0.5"),
        ({"vision": Path("nowhere")}, "image tokenizer nowhere does not exist"),
        ({"size": GridSize(height=20, width=20)}, "positions"),
        ({"max_new_tokens": 9}, "has 20 tokens, but only 9"),
        ({"max_new_tokens": 4000}, "positions"),
    ],
)
def test_bad_requests_are_refused_before_the_weights_are_read(
    run: Path,
    tmp_path: Path,
    changes: dict[str, object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("emu35.stages.generate.run.load_model", unreachable)
    with pytest.raises(ConfigError, match=message):
        generate(options(run, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_all_problems_are_named_together(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        generate(options(run, tmp_path / "out", prompts=[""], batch_size=0, seed=-1))
    assert len(caught.value.problems) == 3


def test_another_codebook_is_refused(run: Path, tmp_path: Path) -> None:
    write_tiny_ibq(tmp_path / "vision", codes=CODES * 2)
    with pytest.raises(ConfigError, match="128 codes, but the language model has 64"):
        generate(options(run, tmp_path / "out", vision=tmp_path / "vision"))


def test_a_folder_that_is_no_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run folder"):
        generate(options(tmp_path, tmp_path / "out"))


def test_an_output_that_cannot_be_made_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        generate(options(run, tmp_path / "file" / "out"))


def test_sizes_as_written_on_a_command_line() -> None:
    assert parse_size("64*48") == parse_size(" 64x48 ") == GridSize(height=64, width=48)
    for text in ("64", "0x4", "4x", "64x48x2", "a*b", "-1x4"):
        with pytest.raises(ConfigError, match="HEIGHTxWIDTH"):
            parse_size(text)


def test_prompts_and_neighbouring_seeds_share_no_noise() -> None:
    seeds = {prompt_seed(seed, index=index) for seed in range(20) for index in range(20)}
    assert len(seeds) == 400
