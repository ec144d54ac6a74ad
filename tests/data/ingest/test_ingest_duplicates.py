"""Duplicates are found over all inputs, in their order, and over interruptions."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ingest_inputs import GreyLevels, documents_of, files_of, options_of, png, rejects_of

from emu35.data.ingest.ingest import ingest
from emu35.data.ingest.manifest import Manifest
from emu35.data.ingest.options import Dedup, Existing
from emu35.data.readers.discover import TextUnit
from emu35.errors import DataError


def lines(path: Path, *texts: str) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def run(inputs: list[Path], out: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {"text_unit": TextUnit.lines, "dedup": Dedup.record, **changes}
    return ingest(options_of(inputs, out, **settings), encoder=GreyLevels())


def ids_of(out: Path) -> list[str]:
    return [name for name, _ in documents_of(out)]


def test_a_document_stays_where_it_came_first(tmp_path: Path) -> None:
    a = lines(tmp_path / "a.txt", "one", "two", "one")
    b = lines(tmp_path / "b.txt", "two", "one", "two", "one", "three")
    summary = run([a, b], tmp_path / "out")
    assert ids_of(tmp_path / "out") == ["a.txt:1", "a.txt:2", "b.txt:5"]
    found = [(row["id"], row["reason"], row["detail"]) for row in rejects_of(tmp_path / "out")]
    assert found == [
        ("a.txt:3", "duplicate", f"the same record as a.txt:1 of {a}"),
        ("b.txt:1", "duplicate", f"the same record as a.txt:2 of {a}"),
        ("b.txt:2", "duplicate", f"the same record as a.txt:1 of {a}"),
        ("b.txt:3", "duplicate", f"the same record as a.txt:2 of {a}"),
        ("b.txt:4", "duplicate", f"the same record as a.txt:1 of {a}"),
    ]
    # b is not refused, though more than max_rejects=0.5 of it are duplicates.
    assert summary.rejects == {"duplicate": 5}
    assert run([a, b], tmp_path / "all", dedup=Dedup.none).documents == 8


def test_pictures_are_compared_by_their_bytes_and_order(tmp_path: Path) -> None:
    for name, grey in (("p", 40), ("q", 80)):
        (tmp_path / f"{name}.png").write_bytes(png(width=16, height=8, grey=grey))
    shutil.copy(tmp_path / "p.png", tmp_path / "copy.png")
    rows: list[dict[str, Any]] = [
        {"id": "a", "image": "p.png", "caption": "one"},
        {"id": "b", "image": "copy.png", "caption": "other words"},
        {"id": "c", "image": "q.png", "caption": "one"},
        {"id": "d", "parts": [{"image": "p.png"}, {"text": "x"}, {"image": "q.png"}]},
        {"id": "e", "parts": [{"image": "q.png"}, {"text": "x"}, {"image": "p.png"}]},
        {"id": "f", "parts": [{"image": "p.png"}, {"image": "q.png"}, {"text": "y"}]},
        {"id": "g", "text": "one"},
        {"id": "h", "text": "one"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    run([path], tmp_path / "out", dedup=Dedup.picture)
    found = [row["id"].split()[1] for row in rejects_of(tmp_path / "out")]
    assert found == ["b", "f"]
    run([path], tmp_path / "records")
    assert [row["id"].split()[1] for row in rejects_of(tmp_path / "records")] == ["h"]


def test_a_rerun_knows_what_earlier_runs_wrote(tmp_path: Path) -> None:
    a = lines(tmp_path / "a.txt", "one", "two")
    b = lines(tmp_path / "b.txt", "two", "three")
    out = tmp_path / "out"
    run([a], out)
    run([a, b], out)
    assert ids_of(out) == ["a.txt:1", "a.txt:2", "b.txt:2"]
    with pytest.raises(DataError, match="dedup was record and is none"):
        run([a, b], out, dedup=Dedup.none)


def test_hashes_of_an_input_that_was_not_finished_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = lines(tmp_path / "a.txt", "one", "two")
    out = tmp_path / "out"
    commit = Manifest.commit

    def killed(manifest: Manifest, entry: Any) -> None:
        raise KeyboardInterrupt

    # Stopped after the hashes were committed and before the shards were.
    monkeypatch.setattr(Manifest, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        run([a], out)
    monkeypatch.setattr(Manifest, "commit", commit)
    run([a], out)
    assert ids_of(out) == ["a.txt:1", "a.txt:2"]


def test_an_input_left_out_for_its_rejects_is_the_first_of_nothing(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "one"}\n{\n{\n')
    good = lines(tmp_path / "good.txt", "one")
    with pytest.raises(DataError, match="2 of 3 records rejected"):
        run([bad, good], tmp_path / "out")
    assert ids_of(tmp_path / "out") == ["good.txt:1"]


def test_an_input_whose_shard_is_lost_is_the_first_again(tmp_path: Path) -> None:
    a, b = lines(tmp_path / "a.txt", "one", "two"), lines(tmp_path / "b.txt", "two", "three")
    out = tmp_path / "out"
    run([a, b], out)
    before = files_of(out)
    (out / "demo-000000.tar").unlink()
    run([a, b], out)
    assert files_of(out) == before


def test_a_replacement_has_a_book_of_its_own(tmp_path: Path) -> None:
    a, b = lines(tmp_path / "a.txt", "one", "two"), lines(tmp_path / "b.txt", "two", "three")
    empty, out = lines(tmp_path / "empty.txt", " "), tmp_path / "out"
    run([a], out)
    # One that comes to nothing leaves the earlier shards, and what is known of them.
    with pytest.raises(DataError, match="earlier shards were kept"):
        run([empty], out, existing=Existing.replace)
    run([a, b], out)
    assert ids_of(out) == ["a.txt:1", "a.txt:2", "b.txt:2"]
    run([b], out, existing=Existing.replace)
    run([b, a], out)
    assert ids_of(out) == ["b.txt:1", "b.txt:2", "a.txt:1"]
    assert len(list((out / ".ingest").glob("seen-*.sqlite"))) == 1


def test_a_lost_or_damaged_book_is_an_error(tmp_path: Path) -> None:
    a, b = lines(tmp_path / "a.txt", "one"), lines(tmp_path / "b.txt", "one")
    out = tmp_path / "out"
    run([a], out)
    (book,) = (out / ".ingest").glob("seen-*.sqlite")
    book.write_bytes(b"no book at all" * 1000)
    with pytest.raises(DataError, match=r"cannot be used \(file is not a database\).*--replace"):
        run([a, b], out)
    book.unlink()
    with pytest.raises(DataError, match="is gone, so that duplicates"):
        run([a, b], out)
