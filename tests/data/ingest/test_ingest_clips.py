"""Clips of one video become one document, in the order of their start."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingest_inputs import GreyLevels, documents_of, options_of, png, rejects_of
from pyarrow import parquet

from emu35.data.ingest.ingest import ingest
from emu35.data.ingest.options import PairOrder
from emu35.data.readers.clips import ClipFields, gather_clips
from emu35.data.readers.records import RawImage, RawRecord, RawText, RecordForm
from emu35.tokens.document import Image, Text

Row = dict[str, Any]
GREYS = {"a1": 4, "a2": 8, "a3": 12, "b1": 16, "b2": 20}


def clip(name: str, *, start: Any) -> Row:
    return {"video_id": name[0], "start": start, "caption": name, "name": name}


CLIPS = [
    clip("b2", start="1:05"),
    clip("a3", start=20),
    clip("b1", start=7.5),
    clip("a1", start=0),
    clip("a2", start="3.25"),
]
"""Scattered, out of order, and with every way to tell a time."""


def write(folder: Path, rows: list[Row], *, kind: str) -> Path:
    """Clips as JSON lines, a tar as img2dataset writes it, or parquet."""
    pictures = {row["name"]: png(width=8, height=8, grey=4 * GREYS[row["name"]]) for row in rows}
    path = folder / f"x.{kind}"
    if kind == "jsonl":
        for name, data in pictures.items():
            (folder / f"{name}.png").write_bytes(data)
        path.write_text("\n".join(json.dumps({"image": f"{r['name']}.png", **r}) for r in rows))
    elif kind == "parquet":
        table = [{**row, "start": str(row["start"]), "png": pictures[row["name"]]} for row in rows]
        parquet.write_table(arrow.Table.from_pylist(table), path)
    else:
        with tarfile.open(path, "w") as tar:
            for row in rows:
                for ending, data in {
                    "png": pictures[row["name"]],
                    "json": json.dumps(row).encode(),
                }.items():
                    info = tarfile.TarInfo(f"{row['name']}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


def picture(name: str) -> Image:
    return Image(np.full((1, 1), GREYS[name]))


def run(path: Path, out: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {"clips": ClipFields(group="video_id"), **changes}
    return ingest(options_of([path], out, **settings), encoder=GreyLevels())


@pytest.mark.parametrize("kind", ["jsonl", "tar", "parquet"])
def test_clips_of_a_video_are_one_document_in_temporal_order(tmp_path: Path, kind: str) -> None:
    run(write(tmp_path, CLIPS, kind=kind), tmp_path / "out")
    found = documents_of(tmp_path / "out")
    assert found == [
        ("b", [Text("b1"), picture("b1"), Text("b2"), picture("b2")]),
        ("a", [part for n in ("a1", "a2", "a3") for part in (Text(n), picture(n))]),
    ]


def test_each_clip_of_a_video_has_the_order_of_pairs(tmp_path: Path) -> None:
    run(write(tmp_path, CLIPS, kind="tar"), tmp_path / "out", order=PairOrder.both)
    ((_, first), _) = documents_of(tmp_path / "out" / "caption_first")
    ((_, second), _) = documents_of(tmp_path / "out" / "image_first")
    assert first == [Text("b1"), picture("b1"), Text("b2"), picture("b2")]
    assert second == [picture("b1"), Text("b1"), picture("b2"), Text("b2")]


def test_a_record_that_is_no_clip_and_a_picture_that_is_none_cost_no_other(tmp_path: Path) -> None:
    rows = [*CLIPS, {"caption": "lost", "name": "a1"}, clip("b2", start="soon")]
    path = write(tmp_path, rows, kind="jsonl")
    (tmp_path / "a2.png").write_bytes(b"<html>")
    run(path, tmp_path / "out", max_rejects=1.0)
    documents = dict(documents_of(tmp_path / "out"))
    assert documents["a"] == [Text("a1"), picture("a1"), Text("a3"), picture("a3")]
    found = {row["id"]: (row["reason"], row["detail"]) for row in rejects_of(tmp_path / "out")}
    assert found["x.jsonl:5"][0] == "not an image"
    assert found["x.jsonl:6"][0] == "not a clip with its video and start"
    assert "'video_id' is None" in found["x.jsonl:6"][1]
    assert "'start' is 'soon'" in found["x.jsonl:7"][1]


def test_a_long_video_is_split_between_clips(tmp_path: Path) -> None:
    # A clip of 1x1 code takes 2 bytes of caption and 7 tokens of picture; a document 2 more. What
    # might stand between two texts is counted, too.
    run(write(tmp_path, CLIPS, kind="tar"), tmp_path / "out", sequence_length=24)
    found = [(name, [p for p in parts if p]) for name, parts in documents_of(tmp_path / "out")]
    assert [(name, len(parts) // 2) for name, parts in found] == [
        ("b", 2),
        ("a", 2),
        ("a#from_clip_3", 1),
    ]


def test_texts_of_two_clips_are_parted(tmp_path: Path) -> None:
    rows = [{"v": 1, "t": n, "parts": [{"text": f"text {n}"}]} for n in (2, 1)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run(tmp_path / "x.jsonl", tmp_path / "out", clips=ClipFields(group="v", order="t"))
    assert documents_of(tmp_path / "out") == [("1", [Text("text 1\n\ntext 2")])]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.binary(max_size=9))))
def test_every_clip_comes_once_videos_in_a_row_and_starts_rising(
    clips: list[tuple[str, int, bytes]],
) -> None:
    records = [
        RawRecord(
            id=str(n),
            parts=[RawText(str(n)), RawImage(data)],
            form=RecordForm.pair,
            fields={"video": video, "start": start},
            offset=n,
        )
        for n, (video, start, data) in enumerate(clips)
    ]
    found = list(gather_clips(records, fields=ClipFields(group="video")))
    order = [int(record.id) for record in found]
    first = {video: n for n, (video, _, _) in reversed(list(enumerate(clips)))}
    assert order == sorted(range(len(clips)), key=lambda n: (first[clips[n][0]], clips[n][1], n))
    for record in found:
        assert isinstance(record, RawRecord)
        assert record.parts[1] == RawImage(clips[int(record.id)][2])
