"""Ingestion end to end, with an encoder that stands in for the image tokenizer."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from ingest_inputs import (
    GreyLevels,
    documents_of,
    files_of,
    options_of,
    png,
    rejects_of,
    write_pairs,
)
from PIL import Image as Pictures
from pyarrow import parquet

from emu35.config.area import Area
from emu35.data.ingest.ingest import ingest
from emu35.data.ingest.options import Existing, PairOrder
from emu35.data.ingest.progress import Progress
from emu35.data.readers.benchmarks import Layout
from emu35.data.readers.discover import TextUnit
from emu35.errors import ConfigError, DataError
from emu35.tokens.document import Image, Special, Text


def test_pairs_become_documents_in_their_order(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "x.tar", count=20)
    encoder = GreyLevels()
    summary = ingest(options_of([source], tmp_path / "out", images_per_call=4), encoder=encoder)
    documents = documents_of(tmp_path / "out")
    assert [name for name, _ in documents] == [f"{number:05d}" for number in range(20)]
    for number, (_, parts) in enumerate(documents):
        size = [(32, 32), (48, 24), (24, 40)][number % 3]
        codes = np.full((size[1] // 8, size[0] // 8), number * 5 % 256 // 4)
        assert parts == [Text(f"caption {number}"), Image(codes)]
    assert summary.documents == 20
    assert summary.rejects == {}
    assert summary.visual_tokens == sum(p[1].codes_HW.size for _, p in documents)
    # Pictures of equal size go through the encoder together: 7, 7 and 6 of them, at most 4 a call.
    assert sorted(encoder.calls) == [2, 3, 3, 4, 4, 4]


def test_both_orders_are_written_from_one_encoding(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "x.tar", count=6)
    encoder = GreyLevels()
    options = options_of([source], tmp_path / "out", order=PairOrder.both)
    summary = ingest(options, encoder=encoder)
    first = documents_of(tmp_path / "out" / "caption_first")
    second = documents_of(tmp_path / "out" / "image_first")
    assert [(name, parts[::-1]) for name, parts in first] == second
    assert isinstance(second[0][1][0], Image)
    assert sum(encoder.calls) == 6
    assert summary.documents == 12


def test_bad_records_are_counted_named_and_do_not_stop_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    whole = png(width=64, height=64, grey=9)
    noise = Pictures.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    pictures = {
        "good.png": whole,
        "fine.png": whole,
        "page.jpg": b"<html>",
        "cut.jpg": buffer.getvalue()[:900],
        "wide.png": png(width=60_000, height=2, grey=0),
        "big.png": png(width=200, height=200, grey=0),
        "alone.png": whole,
    }
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
        if name != "alone.png":
            (folder / name).with_suffix(".txt").write_text("<|image start|>words")
    out = tmp_path / "out"
    options = options_of([folder], out, sequence_length=300, max_rejects=0.8)
    summary = ingest(options, encoder=GreyLevels())
    assert [(name, len(parts)) for name, parts in documents_of(out)] == [
        ("fine.png", 2),
        ("good.png", 2),
    ]
    assert {row["id"]: row["reason"] for row in rejects_of(out)} == {
        "page.jpg": "not an image",
        "cut.jpg": "truncated image",
        "wide.png": "image too large",
        "big.png": "picture longer than the sequence length",
        "alone.png": "picture without a caption",
    }
    assert sum(summary.rejects.values()) == 5
    assert any("1 x truncated image" in line for line in summary.lines())


def test_special_strings_in_captions_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("<|image start|>2*2<|image token|><|extra_204|>")
    ingest(options_of([path], tmp_path / "out"), encoder=None)
    ((_, parts),) = documents_of(tmp_path / "out")
    assert parts == [Text("<|image start|>2*2<|image token|><|extra_204|>")]
    assert not any(isinstance(part, Special) for part in parts)


def test_interleaved_documents_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png(width=16, height=8, grey=40))
    parts = [{"image": "p.png"}, {"text": " then "}, {"image": "p.png"}, {"text": " end"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"parts": parts}))
    ingest(options_of([tmp_path / "x.jsonl"], tmp_path / "out"), encoder=GreyLevels())
    picture = Image(np.full((1, 2), 10))
    ((_, found),) = documents_of(tmp_path / "out")
    assert found == [picture, Text(" then "), picture, Text(" end")]


def test_a_benchmark_becomes_documents_of_question_and_ground_truth(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png(width=16, height=8, grey=40))
    item = {
        "id": "0001",
        "Query": [{"type": "text", "content": "Draw a line."}],
        "Golden": [{"type": "image", "content": "p.png"}, {"type": "text", "content": "Done."}],
    }
    (tmp_path / "ISG-Bench.jsonl").write_text(json.dumps(item) + "\n{}\n")
    inputs, out = [tmp_path / "ISG-Bench.jsonl"], tmp_path / "out"
    options = options_of(inputs, out, layout=Layout.isg_bench)
    summary = ingest(options, encoder=GreyLevels())
    assert summary.rejects == {"not a record of a known form": 1}
    picture = Image(np.full((1, 2), 10))
    ((_, found),) = documents_of(out)
    assert found == [Text("Draw a line."), picture, Text("Done.")]
    with pytest.raises(DataError, match="layout"):
        ingest(options_of(inputs, out), encoder=GreyLevels())
    with pytest.raises(DataError, match="no image tokenizer was given"):
        ingest(options_of(inputs, tmp_path / "x", layout=Layout.isg_bench), encoder=None)


@pytest.mark.parametrize("stop_after", [3, 9, 21])
def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path: Path, stop_after: int) -> None:
    inputs = [write_pairs(tmp_path / f"{n}.tar", count=8, first=8 * n, bad=2) for n in range(4)]
    settings: dict[str, Any] = {"shard_bytes": 9000, "images_per_call": 1}
    ingest(options_of(inputs, tmp_path / "clean", **settings), encoder=GreyLevels())
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        ingest(options_of(inputs, out, **settings), encoder=GreyLevels(stop_after=stop_after))
    encoder = GreyLevels()
    summary = ingest(options_of(inputs, out, **settings), encoder=encoder)
    assert files_of(out) == files_of(tmp_path / "clean")
    assert (out / "rejects.jsonl").read_bytes() == (
        tmp_path / "clean" / "rejects.jsonl"
    ).read_bytes()
    assert summary.skipped == stop_after // 6
    assert sum(encoder.calls) == 6 * (4 - stop_after // 6)
    again = GreyLevels()
    assert ingest(options_of(inputs, out, **settings), encoder=again).skipped == 4
    assert again.calls == []


def test_an_input_with_too_many_rejects_is_left_out_and_retried(tmp_path: Path) -> None:
    good = write_pairs(tmp_path / "good.tar", count=6)
    bad = write_pairs(tmp_path / "bad.tar", count=6, first=6, bad=4)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"bad\.tar had 4 of 6 records rejected, above max_rejects"):
        ingest(options_of([bad, good], out), encoder=GreyLevels())
    assert len(documents_of(out)) == 6
    assert [row["reason"] for row in rejects_of(out)] == ["not an image"] * 4
    write_pairs(bad, count=6, first=6)
    summary = ingest(options_of([bad, good], out), encoder=GreyLevels())
    assert (summary.documents, summary.skipped) == (12, 1)
    assert rejects_of(out) == []


def test_other_options_and_changed_inputs_are_refused(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "x.tar", count=4)
    out = tmp_path / "out"
    ingest(options_of([source], out), encoder=GreyLevels())
    with pytest.raises(DataError, match=r"other options: area was 262144 and is 4096"):
        ingest(options_of([source], out, area=Area(least=4096, most=4096)), encoder=GreyLevels())
    write_pairs(source, count=5)
    with pytest.raises(DataError, match="changed since it was ingested"):
        ingest(options_of([source], out), encoder=GreyLevels())
    options = options_of([source], out, area=Area(least=4096, most=4096), existing=Existing.replace)
    assert ingest(options, encoder=GreyLevels()).documents == 5
    assert len(documents_of(out)) == 5


def test_pictures_of_two_folders_do_not_mix(tmp_path: Path) -> None:
    inputs: list[Path] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(width=32, height=32, grey=9))
        inputs.append(tmp_path / f"{name}.jsonl")
        inputs[-1].write_text(json.dumps({"image": "0.png", "caption": name}) + "\n")
    out = tmp_path / "out"
    ingest(options_of(inputs[:1], out, pictures=tmp_path / "one"), encoder=GreyLevels())
    with pytest.raises(DataError, match=r"other options: pictures was .*one and is .*two"):
        ingest(options_of(inputs, out, pictures=tmp_path / "two"), encoder=GreyLevels())


def test_shards_of_unknown_origin_are_left_alone(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "x.tar", count=4)
    out = tmp_path / "out"
    out.mkdir()
    (out / "demo-000000.tar").write_bytes(b"precious")
    with pytest.raises(DataError, match="already holds shards"):
        ingest(options_of([source], out, existing=Existing.replace), encoder=GreyLevels())
    assert (out / "demo-000000.tar").read_bytes() == b"precious"


def test_pictures_without_an_image_tokenizer_stop_at_once(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "x.tar", count=4)
    with pytest.raises(DataError, match="no image tokenizer was given"):
        ingest(options_of([source], tmp_path / "out"), encoder=None)
    assert files_of(tmp_path / "out") == {}


def test_lines_of_text_become_documents(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one\n\ntwo\n")
    options = options_of([path], tmp_path / "out", text_unit=TextUnit.lines)
    ingest(options, encoder=None)
    assert documents_of(tmp_path / "out") == [
        ("x.txt:1", [Text("one")]),
        ("x.txt:3", [Text("two")]),
    ]


def test_nothing_but_rejects_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text(" ")
    with pytest.raises(DataError, match="no document at all"):
        ingest(options_of([path], tmp_path / "out", max_rejects=1.0), encoder=None)


def test_impossible_options_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)inputs is empty.*area=Area.*max_rejects=2"):
        options_of([], tmp_path, area=Area(least=0, most=0), max_rejects=2.0).validate()


def test_progress_in_a_log_is_plain_lines_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    progress = Progress(label="ingest x", total=400, items="documents", stream=stream)
    progress.skip(100)
    progress.begin(size=300)
    clock[0] += 20
    progress.update(100, items=40)
    progress.close()
    line = stream.getvalue()
    assert line == "ingest x  50%  40 documents  2 documents/s  0:40 left\n"


def test_progress_tells_a_second_rate_over_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    progress = Progress(label="x", total=300, items="pictures", units="codes", stream=stream)
    progress.begin(size=100)
    clock[0] += 10
    progress.update(100, items=5, units=2000)
    progress.begin(size=200)
    clock[0] += 10
    progress.update(50, items=15, units=8000)
    progress.close()
    line = stream.getvalue()
    assert line == "x  50%  20 pictures  1 pictures/s  500 codes/s  0:20 left\n"


def test_a_damaged_parquet_file_does_not_stop_the_other_inputs(tmp_path: Path) -> None:
    inputs = [tmp_path / f"{name}.parquet" for name in ("torn", "other", "good")]
    texts = [np.random.default_rng(n).bytes(100).hex() for n in range(20)]
    for path in inputs:
        column = "words" if path.stem == "other" else "text"
        parquet.write_table(arrow.table({column: texts}), path, use_dictionary=False)
    data = bytearray(inputs[0].read_bytes())
    data[4:40] = bytes(36)  # the header of the only page
    inputs[0].write_bytes(data)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"torn\.parquet had 1 of 1 .*other\.parquet had 1 of 1"):
        ingest(options_of(inputs, out), encoder=None)
    assert [parts for _, parts in documents_of(out)] == [[Text(text)] for text in texts]
    assert [(row["id"], row["reason"]) for row in rejects_of(out)] == [
        ("torn.parquet:1-20", "damaged input file"),
        ("other.parquet", "not a record of a known form"),
    ]


def test_a_damaged_tar_is_kept_to_the_damage_and_named(tmp_path: Path) -> None:
    inputs = [write_pairs(tmp_path / f"{n}.tar", count=6, first=6 * n) for n in range(3)]
    data = bytearray(inputs[0].read_bytes())
    # The header of the fourth picture: a pair is two members of a header and one block each.
    data[3 * 4 * 512 + 10] ^= 0xFF
    inputs[0].write_bytes(data)
    inputs[1].write_bytes(inputs[1].read_bytes()[: 4 * 4 * 512 + 700])
    out = tmp_path / "out"
    summary = ingest(options_of(inputs, out), encoder=GreyLevels())
    found = [name for name, _ in documents_of(out)]
    assert found == [f"{n:05d}" for n in (0, 1, 2, 6, 7, 8, 9, *range(12, 18))]
    assert summary.rejects == {"damaged input file": 2}
    rows = rejects_of(out)
    assert [Path(row["input"]).name for row in rows] == ["0.tar", "1.tar"]
    assert rows[0]["id"] == f"byte {3 * 4 * 512}"
