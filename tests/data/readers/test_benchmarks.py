"""Benchmarks as published: question, then ground truth, as one document an item.

The files are small, of exactly the published layouts and in other words.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from emu35.data.readers.benchmarks import Layout
from emu35.data.readers.discover import TextUnit, find_inputs
from emu35.data.readers.records import RawImage, RawPart, RawRecord, RawText, Reject
from emu35.errors import DataError


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")


def write_lines(path: Path, *items: Any) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def read(path: Path, *, layout: Layout) -> list[RawRecord | Reject]:
    (entry,) = find_inputs([path], text_unit=TextUnit.file, layout=layout)
    assert entry.is_of_pictures
    found = list(entry.read())
    offsets = [record.offset for record in found]
    assert offsets == sorted(offsets)
    assert offsets[-1] == entry.size
    return found


def shown(record: RawRecord | Reject, *, folder: Path) -> list[str]:
    """Texts as they are, pictures as ``[name]``."""

    def one(part: RawPart) -> str:
        if isinstance(part, RawImage):
            assert isinstance(part.data, Path)
            return f"[{part.data.relative_to(folder).as_posix()}]"
        assert isinstance(part, RawText)
        return part.text

    assert isinstance(record, RawRecord), record
    return [one(part) for part in record.parts]


def details(found: list[RawRecord | Reject]) -> list[str]:
    return [f"{r.id}: {r.reason}: {r.detail}" for r in found if isinstance(r, Reject)]


def block(kind: str, content: str) -> dict[str, str]:
    return {"type": kind, "content": content}


def test_isg_bench(tmp_path: Path) -> None:
    pictures(tmp_path, "images/0007_q1.jpg", "images/0007_g1.png")
    item = {
        "id": "0007",
        "Category": "Progressive",
        "Query": [
            block("text", "How does this kite look a minute later? "),
            block("image", "images/0007_q1.JPG"),
        ],
        "Golden": [block("text", "It has risen."), block("image", "images/0007_g1.png")],
        "predict": {"structural": {"Query": ["<query_text1>"]}, "image_tuple": []},
    }
    other = {
        **item,
        "id": "0008",
        "Query": [block("text", "Name a colour.")],
        "Golden": [block("text", "Red.")],
    }
    found = read(write_lines(tmp_path / "ISG-Bench.jsonl", item, other), layout=Layout.isg_bench)
    assert [record.id for record in found] == ["ISG-Bench.jsonl:1 0007", "ISG-Bench.jsonl:2 0008"]
    assert shown(found[0], folder=tmp_path) == [
        "How does this kite look a minute later?",
        "[images/0007_q1.jpg]",
        "It has risen.",
        "[images/0007_g1.png]",
    ]
    assert shown(found[1], folder=tmp_path) == ["Name a colour.\nRed."]


def opening_item(uid: str, *, question: list[Any], answer: list[Any]) -> dict[str, Any]:
    return {
        "total_uid": uid,
        "meta_task_id": "3",
        "meta_task_name": "A family of tasks",
        "subtask_id": "2",
        "subtask_name": "One of them",
        "data_id": uid[-2:],
        "conversations": [{"input": question}, {"output": answer}],
    }


def test_opening(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"images/One of them/{n}.jpg" for n in ("4-i-1", "4-o-1", "4-o-2")))
    base = "./images/One of them/"
    items = [
        opening_item(
            "0302004",
            question=[
                {"image": f"{base}4-i-1.jpg", "text": "<BEGIN> Go on with this story. <image>"}
            ],
            answer=[
                {"image": f"{base}4-o-1.jpg", "text": "The boat leaves. <image>"},
                {"image": f"{base}4-o-2.jpg", "text": "<image> It comes back."},
                {"image": None, "text": "The end."},
            ],
        ),
        opening_item(
            "0302005",
            question=[{"image": None, "text": "Use pictures and text: <BEGIN> How is tea made?"}],
            answer=[{"image": f"{base}4-o-1.jpg", "text": "With hot water."}],
        ),
    ]
    found = read(write_lines(tmp_path / "test_data.jsonl", *items), layout=Layout.opening)
    assert found[0].id == "test_data.jsonl:1 0302004"
    assert shown(found[0], folder=tmp_path) == [
        "Go on with this story.",
        "[images/One of them/4-i-1.jpg]",
        "The boat leaves.",
        "[images/One of them/4-o-1.jpg]",
        "[images/One of them/4-o-2.jpg]",
        "It comes back.\nThe end.",
    ]
    assert shown(found[1], folder=tmp_path) == [
        "Use pictures and text: How is tea made?\nWith hot water.",
        "[images/One of them/4-o-1.jpg]",
    ]


def mmie_item(id: str, **changes: Any) -> dict[str, Any]:
    empty = [{"text": None, "image": None}]
    return {
        "id": id,
        "question": [
            {"text": "Which animal is this?", "image": "images/0.png"},
            {"text": "A. cat B. dog", "image": None},
        ],
        "answer": empty,
        "model": "gt",
        "gt_answer": empty,
        **changes,
    }


@pytest.mark.parametrize("as_lines", [False, True])
def test_mmie(tmp_path: Path, as_lines: bool) -> None:
    pictures(tmp_path, "images/0.png", "images/1.png")
    answered = [{"text": "A dog,", "image": None}, {"text": "as here.", "image": "images/1.png"}]
    items = [
        mmie_item("MSR_1", gt_answer=answered, model="some_model", answer="wrong"),
        mmie_item("SA_2", answer=answered[:1]),
        mmie_item("PBL_3", answer="B", gt_answer=[{"text": " ", "image": None}]),
    ]
    path = tmp_path / "data.json"
    if as_lines:
        write_lines(path, *items)
    else:
        path.write_text(json.dumps(items, indent=2))
    found = read(tmp_path, layout=Layout.mmie)
    question = ["Which animal is this?", "[images/0.png]"]
    assert [record.id for record in found] == [
        f"data.json:{n} {id}" for n, id in ((1, "MSR_1"), (2, "SA_2"), (3, "PBL_3"))
    ]
    assert shown(found[0], folder=tmp_path) == [
        *question,
        "A. cat B. dog\nA dog,\nas here.",
        "[images/1.png]",
    ]
    assert shown(found[1], folder=tmp_path) == [*question, "A. cat B. dog\nA dog,"]
    assert shown(found[2], folder=tmp_path) == [*question, "A. cat B. dog\nB"]


def test_anything_else_is_a_reject_that_names_the_item(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "images/0.png")
    text = [block("text", "x")]
    isg = write_lines(
        tmp_path / "isg.jsonl",
        {"id": "1", "Query": text},
        {"id": "2", "Query": text, "Golden": []},
        {"id": "3", "Query": text, "Golden": [block("video", "a.mp4")]},
        {"id": "4", "Query": text, "Golden": [block("image", "b.png")]},
        {"id": "5", "Query": text, "Golden": ["x"]},
        ["6"],
        {"id": "7", "Query": text, "Golden": [block("text", "")]},
        {"id": "8", "Query": [block("text", " \n")], "Golden": text},
    )
    isg.write_bytes(isg.read_bytes() + b"{broken\n")
    expected = [
        "isg.jsonl:1 1: not a record of a known form: it has no list under 'Golden'",
        "isg.jsonl:2 2: not a record of a known form: 'Golden' is empty",
        "isg.jsonl:3 3: not a record of a known form: Golden[0] has type 'video'; it must be",
        "isg.jsonl:4 4: missing or unreadable file: Golden[0]: b.png",
        "isg.jsonl:5 5: not a record of a known form: 'Golden' holds something that is no object",
        "isg.jsonl:6: not a record of a known form: not an object",
        "isg.jsonl:7 7: not a record of a known form: 'Golden' is empty",
        "isg.jsonl:8 8: not a record of a known form: 'Query' is empty",
        "isg.jsonl:9: not valid JSON: Expecting property name enclosed in double quotes",
    ]
    found = details(read(isg, layout=Layout.isg_bench))
    for line, beginning in zip(found, expected, strict=True):
        assert line.startswith(beginning)
    entry = {"image": "a.png", "text": "<image> and <image>"}
    asked = [{"image": None, "text": "<BEGIN> How?"}]
    turned = opening_item("9", question=[entry], answer=[entry])
    turned["conversations"].reverse()
    opening = write_lines(
        tmp_path / "opening.jsonl",
        opening_item("7", question=[entry], answer=[entry]),
        opening_item("8", question=[{"image": ["a.png"], "text": "x"}], answer=[entry]),
        turned,
        opening_item("10", question=[{"image": None, "text": "see <image> here"}], answer=[entry]),
        opening_item("11", question=asked, answer=[{"image": None, "text": "<BEGIN> "}]),
    )
    places, kinds, order, none, blank = details(read(opening, layout=Layout.opening))
    assert "input[0] has 2 places <image> for one picture" in places
    assert "input[0]: 'text' and 'image' must each be a string or null" in kinds
    assert "it must be an input and then an output" in order
    assert "input[0] has 1 places <image> for no picture" in none
    assert blank.endswith(": 'output' is empty")
    mmie = write_lines(
        tmp_path / "mmie.json",
        mmie_item("SA_1", question=[]),
        mmie_item("SA_2"),
        mmie_item("SA_3", answer=" "),
    )
    assert [line.split(": ")[-1] for line in details(read(mmie, layout=Layout.mmie))] == [
        "'question' is empty",
        "'answer' is empty",
        "'answer' is empty",
    ]


def test_a_folder_must_leave_no_doubt_about_the_file(tmp_path: Path) -> None:
    for name in ("data.json", "overview.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(DataError, match=r"data\.json, overview\.json; give the file .*mmie"):
        find_inputs([tmp_path], text_unit=TextUnit.file, layout=Layout.mmie)
    with pytest.raises(DataError, match="does not exist"):
        find_inputs([tmp_path / "x"], text_unit=TextUnit.file, layout=Layout.mmie)
