"""Every input form gives the records it holds, and a named reject for each bad one."""

import io
import json
import os
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
from pyarrow import parquet

from emu35.data.readers.discover import TextUnit, find_inputs
from emu35.data.readers.records import RawImage, RawRecord, RawText, RecordForm, Reject
from emu35.errors import DataError

Members = Iterable[tuple[str, bytes]]


def write_tar(path: Path, members: Members) -> Path:
    mode = "w:gz" if path.name.endswith("gz") else "w"
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path, *, unit: TextUnit = TextUnit.file) -> list[RawRecord | Reject]:
    return [found for entry in find_inputs([path], text_unit=unit) for found in entry.read()]


def captions(found: list[RawRecord | Reject]) -> dict[str, str]:
    return {
        record.id: part.text
        for record in found
        if isinstance(record, RawRecord)
        for part in record.parts
        if isinstance(part, RawText)
    }


def reasons(found: list[RawRecord | Reject]) -> dict[str, str]:
    return {reject.id: str(reject.reason) for reject in found if isinstance(reject, Reject)}


PAIRS = [
    ("a/000.jpg", b"one"),
    ("a/000.txt", b"first"),
    ("a/000.json", b'{"caption": "unused"}'),
    ("a/001.png", b"two"),
    ("a/001.json", b'{"caption": "second"}'),
]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_a_webdataset_tar_gives_pairs(tmp_path: Path, name: str) -> None:
    found = read(write_tar(tmp_path / name, PAIRS))
    assert captions(found) == {"a/000": "first", "a/001": "second"}
    assert reasons(found) == {}
    record = found[0]
    assert isinstance(record, RawRecord)
    assert record.form is RecordForm.pair
    assert record.parts[1] == RawImage(b"one")


def test_bad_records_of_a_tar_are_named_and_the_others_survive(tmp_path: Path) -> None:
    bad = [
        ("no_text.jpg", b"x"),
        ("blank.jpg", b"x"),
        ("blank.txt", b"  \n"),
        ("no_picture.txt", b"words"),
        ("latin.jpg", b"x"),
        ("latin.txt", b"caf\xe9"),
        ("broken.jpg", b"x"),
        ("broken.json", b"{"),
    ]
    found = read(write_tar(tmp_path / "x.tar", [*bad, *PAIRS]))
    assert reasons(found) == {
        "no_text": "picture without a caption",
        "blank": "picture without a caption",
        "no_picture": "caption without a picture",
        "latin": "text is not UTF-8",
        "broken": "not valid JSON",
    }
    assert set(captions(found)) == {"a/000", "a/001"}


def test_members_that_could_be_records_are_told_of(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("one.jpg", b"1"),
            ("one.txt", b"first"),
            ("one.mask.png", b"no record: it stands beside a picture"),
            ("one.jpg", b"2"),
            ("one.txt", b"second"),
            ("2020.01.02-x.png", b"3"),
            ("2020.txt", b"third"),
            ("new.jxl", b"4"),
        ],
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("again.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "one.jpg"
        tar.addfile(link)
    found = read(path)
    spoken = [each.parts[0] for each in found if isinstance(each, RawRecord)]
    assert spoken == [RawText("first"), RawText("second")]
    rejects = {each.id: each for each in found if isinstance(each, Reject)}
    assert reasons(found) == {
        "2020": "caption without a picture",
        "new": "caption without a picture",
        "again.jpg": "link in a tar",
    }
    assert "2020.01.02-x.png" in rejects["2020"].detail
    assert "first dot" in rejects["2020"].detail
    assert "new.jxl is of no kind that is read (jpg, jpeg, png" in rejects["new"].detail
    assert "--hard-dereference" in rejects["again.jpg"].detail


def test_member_names_that_climb_and_links_touch_no_file(tmp_path: Path) -> None:
    path = tmp_path / "inner" / "x.tar"
    path.parent.mkdir()
    write_tar(path, [("../../evil.jpg", b"x"), ("../../evil.txt", b"words")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    found = read(path)
    assert captions(found) == {"../../evil": "words"}
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_a_tar_that_was_cut_short_keeps_its_whole_records(tmp_path: Path, name: str) -> None:
    many = [
        (f"{n:03d}.{kind}", os.urandom(700) if kind == "jpg" else b"words")
        for n in range(20)
        for kind in ("jpg", "txt")
    ]
    path = write_tar(tmp_path / name, many)
    os.truncate(path, path.stat().st_size * 2 // 3)
    found = read(path)
    assert "damaged input file" in reasons(found).values()
    assert 5 < len(captions(found)) < 20


def test_a_tar_with_a_damaged_header_is_reported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", PAIRS)
    data = bytearray(path.read_bytes())
    data[3 * 1024 + 10] ^= 0xFF  # the header of the second picture
    path.write_bytes(data)
    found = read(path)
    assert captions(found) == {"a/000": "first"}
    assert list(reasons(found).values()) == ["damaged input file"]


def test_a_file_that_is_no_tar_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"hello" * 1000)
    assert reasons(read(path)) == {"x.tar": "damaged input file"}


def test_a_folder_of_pictures_takes_captions_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, data in {
        "a.jpg": b"x",
        "a.txt": b"\xef\xbb\xbfwith a mark",
        "sub/b.PNG": b"x",
        "sub/b.txt": b"below",
        "alone.webp": b"x",
        "orphan.txt": b"words",
        ".hidden.jpg": b"x",
    }.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "c.jpg").write_bytes(b"x")
    (tmp_path / "c.txt").mkdir()
    found = read(tmp_path)
    assert captions(found) == {"a.jpg": "with a mark", "sub/b.PNG": "below"}
    assert reasons(found) == {
        "alone.webp": "picture without a caption",
        "c.jpg": "missing or unreadable file",
        "orphan.txt": "caption without a picture",
    }


def test_json_lines_give_documents_in_reading_order(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"x")
    lines = [
        json.dumps({"id": "doc", "parts": [{"text": "see "}, {"image": "p.png"}, {"text": "."}]}),
        json.dumps({"text": "plain"}),
        json.dumps({"image": "p.png", "caption": "pair"}),
        "",
        "{",
        "[]",
        json.dumps({"parts": [{"sound": "x"}]}),
        json.dumps({"parts": [{"image": "absent.png"}]}),
        json.dumps({"parts": [{"text": " "}]}),
        json.dumps({"words": 1}),
        "[" * 100_000,
        json.dumps({"image": "x" * 5000, "caption": "a name no file can have"}),
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    found = read(path)
    first = found[0]
    assert isinstance(first, RawRecord)
    assert first.parts == [RawText("see "), RawImage(tmp_path / "p.png"), RawText(".")]
    assert first.id == "x.jsonl:1 doc"
    assert [r.form for r in found if isinstance(r, RawRecord)] == ["sequence", "sequence", "pair"]
    assert reasons(found) == {
        "x.jsonl:5": "not valid JSON",
        "x.jsonl:6": "not a record of a known form",
        "x.jsonl:7": "not a record of a known form",
        "x.jsonl:8": "missing or unreadable file",
        "x.jsonl:12": "missing or unreadable file",
        "x.jsonl:9": "empty text",
        "x.jsonl:10": "not a record of a known form",
        "x.jsonl:11": "not valid JSON",
    }


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"image": ["p.png"], "text": "x"}, "'image' is a list"),
        ({"images": ["p.png"], "text": "x"}, "pictures under 'images'"),
        ({"image_url": "http://x/p.png", "text": "x"}, "pictures under 'image_url'"),
        ({"image": None, "caption": "x"}, "'image' is null"),
        ({"image": None, "text": "x"}, "'image' is null"),
        ({"image": {"bytes": "AA=="}, "text": "x"}, "'image' is no string"),
        ({"image": "p.png", "images": ["p.png"], "text": "x"}, "pictures under 'images'"),
        ({"parts": [{"text": "x", "image": "p.png"}]}, "part 0 must have a text or an image"),
        ({"parts": [{"text": "x"}, {"text": "y", "images": ["p.png"]}]}, "part 1 has pictures"),
        ({"parts": [{"text": "x"}, {"image": None}]}, "part 1: 'image' is null"),
        ({"parts": [{"text": "x"}], "image": "p.png"}, "'parts' and beside them ['image']"),
    ],
)
def test_json_lines_never_lose_a_picture_in_silence(
    tmp_path: Path, record: dict[str, object], problem: str
) -> None:
    (tmp_path / "p.png").write_bytes(b"x")
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record))
    (reject,) = read(path)
    assert isinstance(reject, Reject)
    assert str(reject.reason) == "not a record of a known form"
    assert problem in reject.detail
    assert '"parts": [{"text": "..."}, {"image": "path"}, ...]' in reject.detail


def test_json_lines_leave_keys_unread_that_hold_no_picture(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"x")
    lines = [
        {"text": "plain", "url": "http://x", "images": [], "image_count": 3, "video_id": "a"},
        {"image": "p.png", "caption": "pair", "image_url": "http://x/p.png", "image_id": "7"},
        {"image": "p.png", "caption": None, "text": "serves"},
        {"parts": [{"type": "text", "text": "part"}], "image_urls": ["http://x/p.png"]},
        {"caption": "of nothing"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    found = read(path)
    assert list(captions(found).values()) == ["plain", "pair", "serves", "part"]
    assert reasons(found) == {"x.jsonl:5": "caption without a picture"}


def test_text_is_a_document_a_file_or_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\n")
    (tmp_path / "b.md").write_bytes(b"three")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "d.txt").write_bytes(b"")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    whole = read(tmp_path)
    assert captions(whole) == {"a.txt": "one\r\n\r\ntwo\n", "b.md": "three"}
    assert reasons(whole) == {
        "c.txt": "text is not UTF-8",
        "d.txt": "empty text",
        "gone.txt": "missing or unreadable file",
    }
    assert captions(read(tmp_path / "a.txt", unit=TextUnit.lines)) == {
        "a.txt:1": "one",
        "a.txt:3": "two",
    }


def test_an_img2dataset_folder_stands_for_its_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", PAIRS)
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000_stats.json").write_text("{}")
    assert [entry.path.name for entry in find_inputs([tmp_path], text_unit=TextUnit.file)] == [
        "00000.tar"
    ]


def test_parquet_without_pyarrow_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"needs pyarrow.*pip install 'emu35\[parquet\]'"):
        find_inputs([tmp_path / "x.parquet"], text_unit=TextUnit.file)


def test_parquet_text(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    parquet.write_table(arrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), path)
    found = read(path)
    assert captions(found) == {"x.parquet:1": "one", "x.parquet:3": "two"}
    assert reasons(found) == {"x.parquet:2": "empty text"}


@pytest.mark.parametrize(
    "kind", ["large_string", "string_view", "binary", "large_binary", "dictionary"]
)
def test_parquet_text_may_be_stored_in_any_way(tmp_path: Path, kind: str) -> None:
    column = arrow.array(["one", None, "zwei \u00e4"])
    if kind == "dictionary":
        column = column.dictionary_encode()
    else:
        column = column.cast(getattr(arrow, kind)())
    path = tmp_path / "x.parquet"
    parquet.write_table(arrow.table({"text": column}), path)
    found = read(path)
    assert captions(found) == {"x.parquet:1": "one", "x.parquet:3": "zwei \u00e4"}
    assert list(reasons(found)) == ["x.parquet:2"]


def test_a_parquet_text_that_is_not_utf8_is_one_reject(tmp_path: Path) -> None:
    raw = arrow.array([b"one", b"caf\xe9", b"two"], arrow.binary())
    # The type alone says that these are UTF-8; nothing looks at the bytes until they are decoded.
    column = arrow.StringArray.from_buffers(len(raw), *raw.buffers()[1:])
    path = tmp_path / "x.parquet"
    parquet.write_table(arrow.table({"text": column}), path)
    found = read(path)
    assert captions(found) == {"x.parquet:1": "one", "x.parquet:3": "two"}
    assert reasons(found) == {"x.parquet:2": "text is not UTF-8"}


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("harm", ["header", "page"])
def test_a_damaged_parquet_page_loses_its_rows_and_no_others(
    tmp_path: Path, compression: str, harm: str
) -> None:
    path = tmp_path / "x.parquet"
    rng = np.random.default_rng(0)
    parquet.write_table(
        arrow.table({"text": [rng.bytes(200).hex() for _ in range(30)]}),
        path,
        row_group_size=10,
        compression=compression,
        use_dictionary=False,
        write_page_checksum=True,
    )
    with parquet.ParquetFile(path) as file:
        chunk = file.metadata.row_group(1).column(0)
        first = chunk.data_page_offset
        place = first if harm == "header" else first + chunk.total_compressed_size // 2
    data = bytearray(path.read_bytes())
    data[place : place + 20] = bytes(byte ^ 0xFF for byte in data[place : place + 20])
    path.write_bytes(data)
    found = read(path)
    rows = [*range(1, 11), *range(21, 31)]
    assert list(captions(found)) == [f"x.parquet:{row}" for row in rows]
    assert reasons(found) == {"x.parquet:11-20": "damaged input file"}
    (reject,) = (entry for entry in found if isinstance(entry, Reject))
    assert reject.detail.startswith("these 10 rows cannot be read: ")


@pytest.mark.parametrize(
    ("columns", "detail"),
    [
        ({"content": ["words"]}, "needs one column 'text', has the columns ['content']"),
        ({"text": [1, 2]}, "column 'text' holds int64, not text"),
        ({"text": [["a", "b"]]}, "not text; write it as strings"),
    ],
)
def test_parquet_without_a_column_of_text_is_a_named_reject(
    tmp_path: Path, columns: dict[str, list[object]], detail: str
) -> None:
    path = tmp_path / "x.parquet"
    parquet.write_table(arrow.table(columns), path)
    (reject,) = read(path)
    assert isinstance(reject, Reject)
    assert (reject.id, str(reject.reason)) == ("x.parquet", "not a record of a known form")
    assert detail in reject.detail


def test_a_file_that_is_no_parquet_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1" + b"hello" * 100)
    assert reasons(read(path)) == {"x.parquet": "damaged input file"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "does not exist"), ("x.docx", "no known kind"), ("empty", "nothing to ingest")],
)
def test_unusable_inputs_are_refused_before_anything_starts(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "x.docx").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        find_inputs([tmp_path / name], text_unit=TextUnit.file)


def test_an_input_given_twice_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", PAIRS)
    with pytest.raises(DataError, match="given twice"):
        find_inputs([path, tmp_path], text_unit=TextUnit.file)
