"""Records of a file of prompts: each may set what holds for it, and every mistake is named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from tiny_source import options, rows

from emu35.dida.samplers import Sampler
from emu35.errors import ConfigError, DataError
from emu35.inference.ask import SamplingOverride
from emu35.inference.grammar import GridSize
from emu35.inference.request import Decoder, DenoiseOptions
from emu35.run.arguments.generate import RECORDS
from emu35.stages.generate.options import GenerateOptions
from emu35.stages.generate.records import FIELDS, read_records
from emu35.stages.generate.run import check, generate
from emu35.tokens.template import Task


def write(path: Path, *records: object) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def call(tmp_path: Path, *records: object, **changes: object) -> GenerateOptions:
    file = write(tmp_path / "prompts.jsonl", *records)
    base = GenerateOptions(source=tmp_path, out=tmp_path / "out", prompts_file=file)
    return replace(base, **changes)  # type: ignore[arg-type]


def refused(tmp_path: Path, *records: object, **changes: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(call(tmp_path, *records, **changes))
    return caught.value.problems


def test_a_record_sets_what_holds_for_it_alone(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"")
    full = {
        "prompt": "one",
        "id": 7,
        "task": "x2i",
        "images": ["cat.png"],
        "size": "3x4",
        "seed": 5,
        "guidance": 1.5,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.25,
        "text_temperature": 0.75,
        "text_top_k": 9,
        "text_top_p": 0.125,
        "max_new_tokens": 99,
        "steps": 1,
        "stop": "END",
        "decoder": "dida",
        "denoise_steps": 12,
        "sampler": "remdm",
        "denoise_shift": 2,
        "guidance_until": 0.5,
    }
    assert set(full) | {"ratio"} == set(FIELDS), "a key without a test"
    made = check(
        call(tmp_path, full, {"prompt": "two", "seed": None}, ratio="1:1", guidance=4.0, seed=8)
    )
    one, two = made
    assert (one.prompt, one.id, one.task, one.images) == (
        "one",
        "7",
        Task.x2i,
        (tmp_path / "cat.png",),
    )
    assert (one.size, one.ratio) == (GridSize(height=3, width=4), None)
    assert (one.seed, one.own_seed, one.guidance) == (5, True, 1.5)
    assert one.visual == SamplingOverride(temperature=0.5, top_k=3, top_p=0.25)
    assert one.text == SamplingOverride(temperature=0.75, top_k=9, top_p=0.125)
    assert (one.max_new_tokens, one.steps, one.stop) == (99, 1, ("END",))
    chosen = (one.decoder, one.denoise_steps, one.sampler)
    assert chosen == (Decoder.dida, 12, Sampler.remdm)
    assert (one.denoise_shift, one.guidance_until) == (2.0, 0.5)
    asked = one.ask(images=(), seed=0).denoise
    assert asked == DenoiseOptions(sampler=Sampler.remdm, steps=12, shift=2.0, guidance_until=0.5)
    assert (two.decoder, two.denoise_steps, two.sampler) == (Decoder.ar, None, None)
    assert (two.denoise_shift, two.guidance_until) == (None, None)
    assert (two.prompt, two.id, two.task, two.images) == ("two", None, Task.t2i, ())
    assert (two.size, two.ratio, two.guidance) == (None, "1:1", 4.0)
    assert (two.seed, two.own_seed, two.steps) == (8, False, None)


def test_prompts_come_first_and_blank_lines_are_counted(tmp_path: Path) -> None:
    made = check(call(tmp_path, {"prompt": "a"}, "", {"prompt": "b\u2028c"}, prompts=["first"]))
    assert [wish.prompt for wish in made] == ["first", "a", "b\u2028c"]
    assert [wish.where.rpartition(", ")[2] for wish in made] == ["prompt 0", "line 1", "line 3"]


def test_every_problem_of_every_line_is_reported(tmp_path: Path) -> None:
    found = refused(
        tmp_path,
        {"prompt": "fine"},
        "{",
        {"text": "no prompt"},
        {"prompt": "x", "seed": "1", "guidence": 2, "size": "big"},
        {"prompt": " ", "task": "x2i"},
        {"prompt": "x", "images": ["gone.png"]},
        {"prompt": "x", "steps": 0, "seed": -2},
        {"prompt": "x", "guidance": -1e9, "temperature": 1e-30, "text_temperature": 1e9},
        {"prompt": "x", "seed": 2**63},
        batch_size=0,
    )
    numbers = [line.partition("line ")[2].partition(":")[0] for line in found]
    assert numbers == ["", "2", "3", "4", "4", "4", "5", "6", "7", "7", *"8889"]
    text = "\n".join(found)
    for message in (
        "batch_size=0",
        "no prompt in it",
        'seed="1" must be a whole number',
        "unknown key 'guidence'. Did you mean 'guidance'?",
        'size="big" must be "HEIGHTxWIDTH"',
        "line 5: the prompt is empty",
        "gone.png does not exist",
        "steps=0",
        "seed=-2",
        "line 8: guidance=-1000000000.0 must lie in +-1000; 1 turns it off",
        "line 8: image temperature 1e-30 must be 0",
        "line 8: text temperature 1000000000.0 must be 0",
        "line 9: seed=9223372036854775808 must lie in",
    ):
        assert message in text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": 3}, "prompt=3 must be a string"),
        ({"prompt": None}, "prompt=null must be a string"),
        ({"prompt": "x", "task": "t2v"}, "must be one of t2i, x2i"),
        ({"prompt": "x", "task": ["t2i"]}, "must be one of t2i, x2i"),
        ({"prompt": "x", "images": [3]}, "must be a string or a list of strings"),
        ({"prompt": "x", "top_k": 1.5}, "top_k=1.5 must be a whole number"),
        ({"prompt": "x", "top_k": True}, "top_k=true must be a whole number"),
        ({"prompt": "x", "guidance": "2"}, 'guidance="2" must be a number'),
        ({"prompt": "x", "guidance": 10**400}, "guidance=inf"),
        ({"prompt": "x", "id": [1]}, "must be a string or a whole number"),
        ({"prompt": "x", "image": "a.png"}, "Did you mean 'images'"),
        ({"prompt": "x", "size": "3x4", "ratio": "1:1"}, "give one of them"),
        ({"prompt": "x", "denoise_steps": 4}, "denoise_steps holds for parallel decoding, but"),
        ('{"prompt": "x", "guidance": NaN}', "guidance=nan"),
        ("[" * 100_000, "line 1: "),
    ],
)
def test_bad_records(tmp_path: Path, record: object, message: str) -> None:
    (problem,) = refused(tmp_path, record)
    assert message in problem


def test_other_keys_belong_to_the_user(tmp_path: Path) -> None:
    (wish,) = check(call(tmp_path, {"prompt": "x", "scene": {"colour": "red"}, "note": 1}))
    assert wish.prompt == "x"


def test_a_problem_of_all_prompts_is_one_of_the_call(tmp_path: Path) -> None:
    assert refused(tmp_path, *[{"prompt": "x"}] * 9, guidance=float("nan")) == [
        "guidance=nan must lie in +-1000; 1 turns it off"
    ]
    (problem,) = refused(tmp_path, *[{"prompt": ""}] * 9, {"prompt": "x"})
    assert problem.count("prompts.jsonl, line ") == 5
    assert " and 4 more: the prompt is empty" in problem


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path: Path) -> None:
    made = call(tmp_path, {"prompt": "a"}, {"prompt": "b"})
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [wish.prompt for wish in check(made)] == ["a", "b"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    base = call(tmp_path, {"prompt": "x"})
    (tmp_path / "prompts.jsonl").write_bytes(b"\xff")
    for file in (tmp_path / "prompts.jsonl", tmp_path / "gone.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_records(file, options=base)


def test_the_help_lists_every_key() -> None:
    assert all(name in RECORDS for name in FIELDS)


def test_a_file_of_different_tasks(run: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8)
    Picture.fromarray(values).save(tmp_path / "reference.png")
    file = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "a red circle", "seed": 3},
        {"prompt": "like this", "task": "x2i", "images": ["reference.png"], "ratio": None},
        {"prompt": "what is it?", "id": "q", "task": "chat", "max_new_tokens": 9},
        {"prompt": "a red circle", "size": "2x2", "seed": 3},
    )
    call = options(run, tmp_path / "out", prompts=[], prompts_file=file, size=None, image_area=72)
    generate(replace(call, size=GridSize(height=3, width=4)))
    first, like, chat, small = rows(tmp_path / "out")
    assert (first["sizes"], small["sizes"], like["sizes"]) == ([[3, 4]], [[2, 2]], [[3, 4]])
    assert like["references"] == ["001_reference_image.png"]
    assert Picture.open(tmp_path / "out" / "001_reference_image.png").size == (12, 6)
    assert (chat["id"], chat["task"], chat["seed"], first["seed"]) == ("q", "chat", 0, 3)
    assert len(chat["ids"]) <= 9
    assert chat["images"] == []
    # A seed of its own means the same wherever the record stands.
    alone = options(run, tmp_path / "alone", prompts=["a red circle"], seed=3)
    assert generate(alone).answers[0].ids == first["ids"]


def test_records_that_the_model_has_no_room_for_are_named_together(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emu35.stages.generate.run.load_model", None)
    file = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "x" * 300},
        {"prompt": "fine", "size": "3x4"},
        {"prompt": "x", "size": "30x40"},
    )
    with pytest.raises(ConfigError) as caught:
        generate(options(run, tmp_path / "out", prompts=[], prompts_file=file))
    first, second = caught.value.problems
    assert "line 1: the prompt leaves 0 of the model's positions" in first
    assert "line 3: the prompt leaves" in second
    assert not (tmp_path / "out").exists()


def test_every_broken_reference_is_named(run: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no picture")
    file = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "x", "task": "x2i", "images": ["a.png", "b.png"]},
        {"prompt": "y", "task": "x2i", "images": ["a.png"]},
    )
    with pytest.raises(DataError) as caught:
        generate(options(run, tmp_path / "out", prompts=[], prompts_file=file))
    lines = str(caught.value).splitlines()
    assert ["a.png" in lines[0], "b.png" in lines[1], len(lines)] == [True, True, 2]
