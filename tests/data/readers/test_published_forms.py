"""Data as others publish it is read as it is: img2dataset's outputs, OBELICS, LLaVA, edits."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pictures
from pyarrow import parquet

from emu35.data.readers.discover import TextUnit, find_inputs
from emu35.data.readers.records import RawImage, RawRecord, RawSpecial, RawText, RecordForm, Reject


def jpg(grey: int) -> bytes:
    buffer = io.BytesIO()
    Pictures.new("RGB", (16, 8), (grey, grey, grey)).save(buffer, "JPEG")
    return buffer.getvalue()


def read(*paths: Path, pictures: Path | None = None) -> list[RawRecord | Reject]:
    inputs = find_inputs(list(paths), text_unit=TextUnit.file, pictures=pictures)
    return [found for entry in inputs for found in entry.read()]


def records(*paths: Path, pictures: Path | None = None) -> list[RawRecord]:
    found = read(*paths, pictures=pictures)
    assert [entry for entry in found if isinstance(entry, Reject)] == []
    return [entry for entry in found if isinstance(entry, RawRecord)]


def spelled(record: RawRecord) -> str:
    """A record on one line, pictures as their file's name or first bytes."""

    def spell() -> Iterator[str]:
        for part in record.parts:
            if isinstance(part, RawText):
                yield part.text
            elif isinstance(part, RawSpecial):
                yield "|"
            else:
                data = part.data
                yield f"[{data.name if isinstance(data, Path) else data.decode()}]"

    return "".join(spell())


def facts(number: int, *, ok: bool = True) -> dict[str, Any]:
    """What img2dataset notes of a picture."""
    return {
        "url": f"http://x/{number}.jpg",
        "caption": f"caption {number}",
        "key": f"{number:09d}",
        "status": "success" if ok else "failed_to_download",
        "error_message": None if ok else "HTTP Error 404: Not Found",
        "width": 16 if ok else None,
        "height": 8 if ok else None,
        "exif": "{}",
        "sha256": f"{number:064x}",
    }


def write_img2dataset(folder: Path, kind: str) -> None:
    """Six pictures in two shards, the last of each not downloaded, as ``output_format=kind``.

    The sample writers of img2dataset 1.47 are followed step by step; for tars they use, as here,
    the TarWriter of webdataset.
    """
    folder.mkdir()
    stock: Any = webdataset
    for shard in range(2):
        rows = [facts(3 * shard + n, ok=n < 2) for n in range(3)]
        stem = f"{shard:05d}"
        (folder / f"{stem}_stats.json").write_text(json.dumps({"count": 3, "successes": 2}))
        good = rows[:2]
        if kind == "webdataset":
            with stock.TarWriter(str(folder / f"{stem}.tar")) as tar:
                for row in good:
                    tar.write(
                        {
                            "__key__": row["key"],
                            "jpg": jpg(int(row["key"])),
                            "txt": row["caption"],
                            "json": json.dumps(row, indent=4),
                        }
                    )
        if kind == "files":
            (folder / stem).mkdir()
            for row in good:
                base = folder / stem / row["key"]
                base.with_suffix(".jpg").write_bytes(jpg(int(row["key"])))
                base.with_suffix(".txt").write_text(row["caption"])
                base.with_suffix(".json").write_text(json.dumps(row, indent=4))
        if kind == "parquet":
            for row in rows:
                row["jpg"] = jpg(int(row["key"])) if row["status"] == "success" else None
                row["txt"] = row["caption"] if row["jpg"] else None
        parquet.write_table(arrow.Table.from_pylist(rows), folder / f"{stem}.parquet")


@pytest.mark.parametrize("kind", ["webdataset", "files", "parquet"])
@pytest.mark.parametrize("named", ["folder", "everything in it"])
def test_img2dataset_output_is_read_once_whatever_lies_beside_it(
    tmp_path: Path, kind: str, named: str
) -> None:
    if kind == "files" and named != "folder":
        pytest.skip("a folder of files is named as a folder")
    write_img2dataset(tmp_path / "laion", kind)
    folder = tmp_path / "laion"
    found = read(*([folder] if named == "folder" else sorted(folder.iterdir())))
    pairs = [entry for entry in found if isinstance(entry, RawRecord)]
    texts = [part.text for entry in pairs for part in entry.parts if isinstance(part, RawText)]
    assert texts == [f"caption {number}" for number in (0, 1, 3, 4)]
    assert all(entry.form is RecordForm.pair for entry in pairs)
    for number, entry in zip((0, 1, 3, 4), pairs, strict=True):
        (picture,) = entry.pictures()
        data = picture.data
        assert (data if isinstance(data, bytes) else data.read_bytes()) == jpg(number)
    rejects = [(entry.reason, entry.detail) for entry in found if isinstance(entry, Reject)]
    failed = ("caption without a picture", "failed_to_download: HTTP Error 404: Not Found")
    # Of what was not downloaded, img2dataset keeps a row in parquet alone.
    assert [reason for reason, _ in rejects] == [failed[0]] * (2 if kind == "parquet" else 0)
    assert all(detail == failed[1] for _, detail in rejects)


def test_a_picture_in_a_folder_takes_its_caption_from_json(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "a.json").write_text(json.dumps({"caption": "from json"}))
    (tmp_path / "b.jpg").write_bytes(b"b")
    (tmp_path / "b.json").write_text("{")
    one, two = read(tmp_path)
    assert isinstance(one, RawRecord)
    assert spelled(one) == "from json[a.jpg]"
    assert isinstance(two, Reject)
    assert two.reason == "not valid JSON"


OBELICS = {
    "images": [None, "a.jpg", None, None, "b.jpg"],
    "texts": ["One.", None, "Two.", "Three.", None],
    "metadata": "[null]",
    "general_metadata": "{}",
}


def test_obelics_rows_keep_their_order(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    (tmp_path / "x.jsonl").write_text(json.dumps(OBELICS))
    parquet.write_table(arrow.Table.from_pylist([OBELICS]), tmp_path / "x.parquet")
    for kind in ("jsonl", "parquet"):
        (found,) = records(tmp_path / f"x.{kind}")
        assert spelled(found) == "One.[a.jpg]Two.\n\nThree.[b.jpg]"
        assert found.form is RecordForm.sequence
    row = {"images": [None, {"bytes": b"P", "path": None}], "texts": ["One.", None]}
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "y.parquet")
    assert spelled(records(tmp_path / "y.parquet")[0]) == "One.[P]"
    row = {"images": [b"Q", None], "texts": [None, "One."]}
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "z.parquet")
    assert spelled(records(tmp_path / "z.parquet")[0]) == "[Q]One."


@given(st.lists(st.tuples(st.booleans(), st.text("xyz ", min_size=1, max_size=4)), max_size=8))
def test_an_interleaved_row_shows_every_picture_and_text_in_order(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[bool, str]]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "obelics"
    folder.mkdir(exist_ok=True)
    (folder / "p.jpg").write_bytes(b"x")
    row = {
        "images": ["p.jpg" if shown else None for shown, _ in parts],
        "texts": [None if shown else text for shown, text in parts],
    }
    (folder / "x.jsonl").write_text(json.dumps(row))
    (found,) = read(folder / "x.jsonl")
    if not any(shown or text.strip() for shown, text in parts):
        assert isinstance(found, Reject)
        assert found.reason == "empty text"
        return
    assert isinstance(found, RawRecord)
    plain = spelled(found).replace("\n\n", "")
    assert plain == "".join("[p.jpg]" if shown else text for shown, text in parts)


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"images": ["https://x/a.jpg"], "texts": [None]}, "picture is an address", "https://x/a"),
        ({"image": "http://x/a.jpg", "caption": "c"}, "picture is an address", "img2dataset"),
        ({"images": ["a.jpg"], "texts": ["x"]}, "not a record", "are both given"),
        ({"images": ["a.jpg"], "texts": []}, "not a record", "1 images and 0 texts"),
        ({"images": [None], "texts": [3]}, "not a record", "texts[0] is not a string"),
        ({"images": ["no.jpg"], "texts": [None]}, "missing", "images[0]: no.jpg"),
    ],
)
def test_rows_that_cannot_be_read_say_why(
    tmp_path: Path, row: dict[str, Any], reason: str, detail: str
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    (found,) = read(tmp_path / "x.jsonl")
    assert isinstance(found, Reject)
    assert reason in found.reason
    assert detail in found.detail


def said(*texts: str) -> list[dict[str, str]]:
    speakers = ("human", "gpt")
    return [{"from": speakers[n % 2], "value": text} for n, text in enumerate(texts)]


OPENING = "You are a helpful assistant. USER: "
LLAVA: list[tuple[dict[str, Any], str]] = [
    (
        {"id": "1", "image": "a.jpg", "conversations": said("<image>\nWhat?", "A cup.")},
        f"{OPENING}What?[a.jpg] ASSISTANT: |A cup.|",
    ),
    (
        {"id": 2, "image": "a.jpg", "conversations": said("What?\n<image>", "A.", "And?", "B.")},
        f"{OPENING}What?[a.jpg] ASSISTANT: |A.| USER: And? ASSISTANT: |B.|",
    ),
    (
        {"id": "3", "conversations": said("Why?", "So.")},
        f"{OPENING}Why? ASSISTANT: |So.|",
    ),
    (
        {
            "id": "4",
            "image": ["a.jpg", "b.jpg"],
            "conversations": said("Is <image> like <image>?", "No."),
        },
        f"{OPENING}Is [a.jpg] like [b.jpg]? ASSISTANT: |No.|",
    ),
    (
        {
            "id": "5",
            "images": ["a.jpg", "b.jpg"],
            "conversations": said("<image>\nWhat?", "A.", "<image>\nAnd?", "B."),
        },
        f"{OPENING}What?[a.jpg] ASSISTANT: |A.| USER: And?[b.jpg] ASSISTANT: |B.|",
    ),
    (
        {"id": "6", "image": "b.jpg", "conversations": said("What?", "A jug.")},
        f"{OPENING}What?[b.jpg] ASSISTANT: |A jug.|",
    ),
]


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_conversations_of_llava_become_chats(tmp_path: Path, kind: str) -> None:
    shown = tmp_path / "coco"
    shown.mkdir()
    for name in "ab":
        (shown / f"{name}.jpg").write_bytes(name.encode())
    rows = [row for row, _ in LLAVA]
    path = tmp_path / f"llava.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows, indent=2))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        path = tmp_path / "llava.parquet"
        plain = [row for row in rows if not isinstance(row.get("image"), list)]
        keys = ("image", "images", "conversations")
        table = arrow.Table.from_pylist([{key: row.get(key) for key in keys} for row in plain])
        parquet.write_table(table, path)
    found = records(path, pictures=shown)
    wanted = [
        text for row, text in LLAVA if kind != "parquet" or not isinstance(row.get("image"), list)
    ]
    assert [spelled(entry) for entry in found] == wanted
    assert {entry.form for entry in found} == {RecordForm.task}


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"conversations": said("<image>What?", "A.")}, "1 places <image> and it names 0"),
        ({"image": "a.jpg", "conversations": said("<image><image>?", "A.")}, "2 places <image>"),
        ({"conversations": said("What?")}, "1 messages"),
        ({"conversations": []}, "0 messages"),
        ({"conversations": [{"from": "system", "value": "x"}, *said("y")]}, "from 'system'"),
        ({"video": "a.mp4", "conversations": said("What?", "A.")}, "it has a 'video'"),
        ({"conversations": said("What?", " ")}, "turn 0 is blank"),
        ({"conversations": said("Draw.", "<image>")}, "story or howto"),
    ],
)
def test_a_conversation_that_is_none_says_why(
    tmp_path: Path, row: dict[str, Any], detail: str
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    (found,) = read(tmp_path / "x.jsonl")
    assert isinstance(found, Reject)
    assert found.reason == "not a conversation as LLaVA writes them"
    assert detail in found.detail


def test_a_json_list_that_breaks_off_keeps_what_came_before(tmp_path: Path) -> None:
    whole = json.dumps([{"text": f"document {number}"} for number in range(5)])
    path = tmp_path / "x.json"
    path.write_text(whole[:-30])
    found = read(path)
    assert [spelled(entry) for entry in found if isinstance(entry, RawRecord)] == [
        "document 0",
        "document 1",
        "document 2",
    ]
    assert isinstance(found[-1], Reject)
    assert (found[-1].id, found[-1].reason) == ("x.json:4", "damaged input file")
    path.write_text('{"text": "an object"}')
    (found,) = read(path)
    assert isinstance(found, Reject)
    assert "does not begin with a bracket" in found.detail


@pytest.mark.parametrize("rest", ['[{"text": "b"}]', ', {"text": "b"}]', "]"])
def test_what_follows_a_json_list_is_told_of(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "joined.json"
    path.write_text('[{"text": "a"}]\n' + " " * 3_000_000 + rest)
    record, reject = read(path)
    assert isinstance(record, RawRecord)
    assert isinstance(reject, Reject)
    assert reject.reason == "damaged input file"
    assert "something follows its closing bracket" in reject.detail
    path.write_text('[{"text": "a"}]\n \n')
    (record,) = read(path)
    assert isinstance(record, RawRecord)


def test_a_json_list_longer_than_a_piece_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    texts = [f"{number} " + "\u00e4" * (number * 40_000 % 1_700_000 + 1) for number in range(60)]
    path.write_text(json.dumps([{"text": text} for text in texts], ensure_ascii=False), "utf-8")
    assert [spelled(entry) for entry in records(path)] == texts


EDITS: list[tuple[str, dict[str, str]]] = [
    ("ours", {"source": "a", "instruction": "do", "target": "b"}),
    ("InstructPix2Pix", {"input_image": "a", "edit_prompt": "do", "edited_image": "b"}),
    (
        "InstructPix2Pix, filtered",
        {
            "original_prompt": "x",
            "original_image": "a",
            "edit_prompt": "do",
            "edited_prompt": "y",
            "edited_image": "b",
        },
    ),
    (
        "MagicBrush",
        {"img_id": "7", "source_img": "a", "mask_img": "m", "instruction": "do", "target_img": "b"},
    ),
    ("UltraEdit", {"source_image": "a", "edit_prompt": "do", "edited_image": "b"}),
    ("OmniEdit", {"task": "removal", "src_img": "a", "edit_prompt": "do", "edited_img": "b"}),
]
PICTURED = {"a", "b", "m"}


@pytest.mark.parametrize(("row"), [row for _, row in EDITS], ids=[name for name, _ in EDITS])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_published_edits_become_x2i(tmp_path: Path, row: dict[str, str], kind: str) -> None:
    for name in PICTURED:
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    path = tmp_path / f"x.{kind}"
    shape = f"You are a helpful assistant for x2i task. USER: [{'{a}'}]do ASSISTANT: |[{'{b}'}]|"
    if kind == "jsonl":
        line = {key: f"{v}.jpg" if v in PICTURED else v for key, v in row.items()}
        path.write_text(json.dumps(line))
        wanted = shape.format(a="a.jpg", b="b.jpg")
    else:
        picture = {v: {"bytes": v.encode(), "path": f"{v}.jpg"} for v in PICTURED}
        table = [{key: picture.get(v, v) for key, v in row.items()}]
        parquet.write_table(arrow.Table.from_pylist(table), path)
        wanted = shape.format(a="a", b="b")
    (found,) = records(path)
    assert spelled(found) == wanted


def test_an_edit_of_several_sources_shows_them_all(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    row = {"sources": ["a.jpg", "b.jpg"], "instruction": "join", "target": "c.jpg"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    assert "[a.jpg][b.jpg]join" in spelled(records(tmp_path / "x.jsonl")[0])
    for wrong, detail in [
        ({"instruction": "do", "target": "c.jpg"}, "0 source pictures and 1 targets"),
        ({"source": "a.jpg", "instruction": " ", "target": "c.jpg"}, "blank"),
        ({"source": 3, "instruction": "do", "target": "c.jpg"}, "not a path"),
    ]:
        (tmp_path / "x.jsonl").write_text(json.dumps(wrong))
        (found,) = read(tmp_path / "x.jsonl")
        assert isinstance(found, Reject)
        assert found.reason == "not an edit of pictures, instruction and target"
        assert detail in found.detail


def test_pictures_with_captions_in_parquet(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": b"one", "path": None}, "text": "first"},
        {"image": {"bytes": b"two", "path": None}, "text": "second"},
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    found = records(tmp_path / "x.parquet")
    assert [entry.parts for entry in found] == [
        [RawText("first"), RawImage(b"one")],
        [RawText("second"), RawImage(b"two")],
    ]


def test_a_row_of_parquet_that_is_not_utf8_is_one_reject(tmp_path: Path) -> None:
    raw = arrow.array([b"one", b"caf\xe9", b"two"], arrow.binary())
    texts = arrow.StringArray.from_buffers(len(raw), *raw.buffers()[1:])
    table = arrow.table({"jpg": [b"a", b"b", b"c"], "caption": texts})
    parquet.write_table(table, tmp_path / "x.parquet")
    one, two, three = read(tmp_path / "x.parquet")
    assert isinstance(one, RawRecord)
    assert isinstance(two, Reject)
    assert (two.id, two.reason) == ("x.parquet:2", "text is not UTF-8")
    assert isinstance(three, RawRecord)


def test_other_pictures_of_a_row_are_never_lost_in_silence(tmp_path: Path) -> None:
    row = {"jpg": b"a", "caption": "x", "images": [b"b"]}
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "x.parquet")
    (found,) = read(tmp_path / "x.parquet")
    assert isinstance(found, Reject)
    assert "'images'" in found.detail
