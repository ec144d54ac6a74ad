"""``emu35 data tokenize`` without a network: what is written, counted, refused and read again."""

import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from codes_tars import records_of, results_of, tokenized
from forked import dies_at
from ingest_inputs import (
    GreyLevels,
    codes_of,
    documents_of,
    files_of,
    options_of,
    png,
    rejects_of,
    write_pairs,
)
from PIL import Image as Pictures

from emu35.config.area import Area
from emu35.data.ingest.ingest import ingest
from emu35.data.ingest.options import Dedup, Existing, PairOrder
from emu35.data.readers import picture_inputs
from emu35.errors import ConfigError, DataError, LaunchError


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill, unlike a power cut, loses nothing for want of a sync; without them this is quick."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Deadly(GreyLevels):
    """Kills its process at a white picture, as the kernel does when memory runs out."""

    def encode(self, pictures: Sequence[Pictures.Image]) -> list[npt.NDArray[np.integer[Any]]]:
        found = super().encode(pictures)
        if any(int(codes.max()) == 63 for codes in found):
            os.kill(os.getpid(), signal.SIGKILL)
        return found


def write_photos(folder: Path, *, count: int) -> Path:
    """Pictures of three sizes in subfolders; some have a caption, one a damaged one."""
    for number in range(count):
        place = folder / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        size = [(32, 32), (48, 24), (24, 40)][number % 3]
        picture = png(width=size[0], height=size[1], grey=number * 9)
        (place / f"a.b {number}.png").write_bytes(picture)
        if number % 2:
            (place / f"a.b {number}.json").write_text(
                json.dumps({"caption": f"photo {number}", "url": f"u{number}"})
            )
    return folder


def add_member(path: Path, *, name: str, data: bytes) -> None:
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def test_every_picture_is_a_record_with_its_codes_and_what_is_known_of_it(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", count=5)
    summary = tokenized([photos], tmp_path / "out")
    found = records_of(tmp_path / "out")
    names = [facts["tokenized"]["id"] for facts, _ in found]
    assert names == ["0/a.b 0.png", "0/a.b 2.png", "0/a.b 4.png", "1/a.b 1.png", "1/a.b 3.png"]
    for facts, codes in found:
        picture = Pictures.open(photos / facts["tokenized"]["id"])
        assert codes.dtype == np.uint32
        np.testing.assert_array_equal(codes, codes_of(picture))
        told = facts["tokenized"]
        assert (told["width"], told["height"]) == picture.size
        assert (told["rows"], told["columns"]) == codes.shape
        assert told["tokenizer"] == GreyLevels.digest
        assert (told["dtype"], told["codebook_size"], told["factor"]) == ("float32", 64, 8)
    captioned = {facts["tokenized"]["id"]: facts for facts, _ in found if "caption" in facts}
    assert captioned.keys() == {"1/a.b 1.png", "1/a.b 3.png"}
    assert captioned["1/a.b 1.png"]["caption"] == "photo 1"
    assert captioned["1/a.b 1.png"]["url"] == "u1"
    assert summary.counts.documents == 5
    assert summary.usage.codes == sum(codes.size for _, codes in found)
    text = "\n".join(summary.lines())
    assert f"5 pictures, {summary.usage.codes} codes, 1 tars from 1 inputs" in text
    assert "pictures/s" in text
    assert "codebook: 5 of 64 codes used (7.8%), perplexity" in text
    report = json.loads((tmp_path / "out/usage.json").read_text())
    assert report["pictures"] == 5
    assert report["grids"] == {"3x6": 2, "4x4": 2, "5x3": 1}


def test_pictures_of_one_size_are_encoded_together_whatever_their_order(tmp_path: Path) -> None:
    encoder = GreyLevels()
    tokenized([write_pairs(tmp_path / "a.tar", count=12)], tmp_path / "out", encoder=encoder)
    assert encoder.calls == [4, 4, 4]
    few = GreyLevels()
    tokenized([tmp_path / "a.tar"], tmp_path / "few", encoder=few, images_per_call=3)
    assert sorted(few.calls) == [1, 1, 1, 3, 3, 3]
    assert results_of(tmp_path / "few") == results_of(tmp_path / "out")


def test_damaged_pictures_are_counted_and_named(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.tar", count=4, bad=1)
    picture = png(width=32, height=32, grey=9)
    add_member(path, name="cut.png", data=picture[: len(picture) - 30])
    add_member(path, name="alone.png", data=picture)
    add_member(path, name="text.txt", data=b"no picture")
    summary = tokenized([path], tmp_path / "out")
    assert [(row["id"], row["reason"]) for row in rejects_of(tmp_path / "out")] == [
        ("00000", "not an image"),
        ("cut", "truncated image"),
        ("text", "caption without a picture"),
    ]
    ids = [facts["tokenized"]["id"] for facts, _ in records_of(tmp_path / "out")]
    assert ids == ["00001", "00002", "00003", "alone"]
    assert "rejected: 1 x truncated image" in summary.lines()


def test_an_input_that_is_mostly_damaged_fails_and_is_left_out_of_the_report(
    tmp_path: Path,
) -> None:
    good = write_pairs(tmp_path / "good.tar", count=3)
    bad = write_pairs(tmp_path / "bad.tar", count=3, first=3, bad=2)
    with pytest.raises(DataError, match=r"bad\.tar had 2 of 3 records rejected"):
        tokenized([bad, good], tmp_path / "out")
    assert len(records_of(tmp_path / "out")) == 3
    assert json.loads((tmp_path / "out/usage.json").read_text())["pictures"] == 3
    assert len(rejects_of(tmp_path / "out")) == 2


def inputs_of(folder: Path, *, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two tars with rejects in them and a folder of three stretches."""
    monkeypatch.setattr(picture_inputs, "STRETCH", 3)
    tars = [write_pairs(folder / f"{n}.tar", count=5, first=5 * n, bad=n) for n in range(2)]
    return [tars[0], write_photos(folder / "photos", count=7), tars[1]]


def test_results_are_the_same_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(tmp_path, monkeypatch=monkeypatch)
    found = {
        workers: tokenized(inputs, tmp_path / f"out{workers}", workers=workers, shard_bytes=5000)
        for workers in (1, 3)
    }
    assert results_of(tmp_path / "out3") == results_of(tmp_path / "out1")
    assert len(list((tmp_path / "out1").glob("*.tar"))) > 6
    assert (found[1].counts.inputs, found[1].counts.documents) == (5, 16)
    assert found[3].counts.new_tokens == found[1].counts.new_tokens == found[1].usage.codes
    assert not list((tmp_path / "out3/.ingest/encoded").iterdir())


def test_a_worker_that_dies_costs_nothing_but_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(tmp_path, monkeypatch=monkeypatch)
    (tmp_path / "photos/0/white.png").write_bytes(png(width=8, height=8, grey=255))
    with pytest.raises(LaunchError, match="photos#000001; what was finished is kept"):
        tokenized(inputs, tmp_path / "out", encoder=Deadly(), workers=2)
    tokenized(inputs, tmp_path / "out", workers=2)
    tokenized(inputs, tmp_path / "clean")
    assert results_of(tmp_path / "out") == results_of(tmp_path / "clean")


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_change_of_the_disk_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(picture_inputs, "STRETCH", 2)
    tar = write_pairs(tmp_path / "0.tar", count=4, bad=1)
    inputs = [tar, write_photos(tmp_path / "photos", count=3)]
    tokenized(inputs, tmp_path / "clean", shard_bytes=5000)
    change, killed = 0, True
    while killed:
        change += step
        out = tmp_path / "out"
        killed = dies_at(change, work=lambda out=out: tokenized(inputs, out, shard_bytes=5000))
        if killed:
            tokenized(inputs, out, shard_bytes=5000)
        assert results_of(out) == results_of(tmp_path / "clean"), f"killed before {change}"
        assert list(out.rglob("*.tmp")) == []
        shutil.rmtree(out)
    assert change > 20


def test_a_rerun_does_nothing_and_a_lost_or_damaged_tar_is_made_again(tmp_path: Path) -> None:
    inputs = [write_pairs(tmp_path / f"{n}.tar", count=3, first=3 * n) for n in range(3)]
    out = tmp_path / "out"
    tokenized(inputs, out)
    before = results_of(out)
    idle = GreyLevels()
    summary = tokenized(inputs, out, encoder=idle)
    assert (idle.calls, summary.counts.skipped, summary.counts.new_documents) == ([], 3, 0)
    assert "3 inputs were done already" in summary.lines()
    (out / "demo-000001.tar").unlink()
    data = (out / "demo-000002.tar").read_bytes()
    (out / "demo-000002.tar").write_bytes(data[:-1024])
    busy = GreyLevels()
    tokenized(inputs, out, encoder=busy)
    assert sum(busy.calls) == 6
    assert results_of(out) == before


def test_other_options_are_refused_and_replaced_when_asked(tmp_path: Path) -> None:
    path, out = write_pairs(tmp_path / "a.tar", count=3), tmp_path / "out"
    tokenized([path], out)
    with pytest.raises(DataError, match=r"area was 262144 and is 64\. Use them again"):
        tokenized([path], out, area=Area(least=64, most=64))
    tokenized([path], out, area=Area(least=64, most=64), existing=Existing.replace)
    assert len(records_of(out)) == 3
    with pytest.raises(DataError, match="made with other options"):
        ingest(options_of([path], out), encoder=GreyLevels())
    with pytest.raises(ConfigError, match=r"(?s)inputs is empty.*workers=0.*max_rejects=2"):
        tokenized([], out, workers=0, max_rejects=2.0)


def test_a_replacement_that_fails_leaves_the_earlier_report(tmp_path: Path) -> None:
    path, out = write_pairs(tmp_path / "a.tar", count=3), tmp_path / "out"
    tokenized([path], out)
    report = (out / "usage.json").read_bytes()
    write_pairs(path, count=3, bad=3)
    with pytest.raises(DataError, match="The earlier shards were kept"):
        tokenized([path], out, existing=Existing.replace)
    assert (out / "usage.json").read_bytes() == report
    assert len(records_of(out)) == 3
    write_pairs(path, count=3)
    more = write_pairs(tmp_path / "b.tar", count=2, first=3)
    assert tokenized([path, more], out).usage.pictures == 5


@pytest.mark.parametrize("change", ["words", "times", "new", "gone"])
def test_what_lies_beside_the_pictures_of_a_folder_is_part_of_it(
    tmp_path: Path, change: str
) -> None:
    photos, out = write_photos(tmp_path / "photos", count=3), tmp_path / "out"
    (photos / "notes.txt").write_text("of no picture")
    tokenized([photos], out)
    (photos / "notes.txt").write_text("changed")
    assert tokenized([photos], out).counts.skipped == 1
    side = photos / "1/a.b 1.json"
    if change == "gone":
        side.unlink()
    elif change == "new":
        (photos / "0/a.b 0.txt").write_text("words")
    elif change == "words":
        side.write_text(json.dumps({"caption": "other words than those before"}))
    else:
        side.write_text(side.read_text().replace("photo", "PHOTO"))
        os.utime(side, ns=(0, side.stat().st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"photos#000000 changed since .* use --replace"):
        tokenized([photos], out)
    tokenized([photos], out, existing=Existing.replace)
    tokenized([photos], tmp_path / "clean")
    assert results_of(out) == results_of(tmp_path / "clean")


def test_inputs_without_pictures_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "empty").mkdir()
    tar = write_pairs(tmp_path / "a.tar", count=1)
    for inputs, said in [
        ([tmp_path / "a.jsonl"], r"a\.jsonl is no tar; give image tars, or folders"),
        ([tmp_path / "empty"], "empty holds neither tars nor pictures"),
        ([tmp_path / "x.tar"], r"x\.tar does not exist"),
        ([tar, tar], "is given twice"),
    ]:
        with pytest.raises(DataError, match=said):
            tokenized(inputs, tmp_path / "out")


# ---------------------------------------------------------------- codes as inputs of an ingestion


class Blind(GreyLevels):
    """Knows whose codes they are, and cannot encode."""

    def prepare(self, data: bytes | Path) -> Pictures.Image:
        raise AssertionError("a picture was opened")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"order": PairOrder.both, "dedup": Dedup.record},
        {"dedup": Dedup.picture, "sequence_length": 30, "max_rejects": 1.0},
    ],
    ids=["plain", "both orders", "too long"],
)
def test_token_shards_of_codes_are_those_of_the_pictures(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    pictures = write_pairs(tmp_path / "pictures.tar", count=9)
    tokenized([pictures], tmp_path / "codes")
    found = ingest(options_of([pictures], tmp_path / "a", **settings), encoder=GreyLevels())
    codes = [tmp_path / "codes"]
    again = ingest(options_of(codes, tmp_path / "b", **settings), encoder=Blind())
    assert files_of(tmp_path / "b") == files_of(tmp_path / "a")
    assert again.documents == found.documents > 0
    ours, theirs = ([row | {"input": ""} for row in rejects_of(tmp_path / n)] for n in "ba")
    assert ours == theirs


def test_ids_and_captions_of_a_folder_survive_the_way_through_codes(tmp_path: Path) -> None:
    tokenized([write_photos(tmp_path / "photos", count=4)], tmp_path / "codes")
    summary = ingest(options_of([tmp_path / "codes"], tmp_path / "out"), encoder=Blind())
    assert [name for name, _ in documents_of(tmp_path / "out")] == ["1/a.b 1.png", "1/a.b 3.png"]
    assert summary.rejects == {"picture without a caption": 2}


class Other(GreyLevels):
    digest = "other" * 10


class Half(GreyLevels):
    dtype = "bfloat16"


@pytest.mark.parametrize("encoder", [Other(), Half()], ids=["weights", "dtype"])
def test_codes_of_another_tokenizer_stop_the_ingestion(tmp_path: Path, encoder: GreyLevels) -> None:
    tokenized([write_pairs(tmp_path / "a.tar", count=2)], tmp_path / "codes")
    with pytest.raises(DataError, match="Give the tokenizer that made the codes, or encode"):
        ingest(options_of([tmp_path / "codes"], tmp_path / "out"), encoder=encoder)
    with pytest.raises(DataError, match="no image tokenizer was given"):
        ingest(options_of([tmp_path / "codes"], tmp_path / "out"), encoder=None)
    assert files_of(tmp_path / "out") == {}


def test_codes_that_are_damaged_or_nobodys_are_rejects(tmp_path: Path) -> None:
    tokenized([write_pairs(tmp_path / "a.tar", count=4)], tmp_path / "codes")
    with tarfile.open(tmp_path / "codes/demo-000000.tar") as tar:
        file = tar.extractfile("000000-000000.json")
        assert file is not None
        facts = file.read()
    path = write_pairs(tmp_path / "b.tar", count=3)
    big = io.BytesIO()
    np.save(big, np.full((2, 2), 64, np.uint32))
    wrong = facts.replace(b'"dtype": "float32"', b'"dtype": null')
    for name, codes, text in [
        ("x", b"no codes", facts),
        ("y", big.getvalue(), facts),
        ("z", big.getvalue(), wrong),
        ("w", big.getvalue(), b'{"caption": "nobody\'s"}'),
    ]:
        add_member(path, name=f"{name}.codes.npy", data=codes)
        add_member(path, name=f"{name}.json", data=text)
    ingest(options_of([path], tmp_path / "out", max_rejects=1.0), encoder=GreyLevels())
    found = rejects_of(tmp_path / "out")
    assert {row["reason"] for row in found} == {"not codes as emu35 data tokenize writes them"}
    assert [row["detail"].partition(";")[0] for row in found][1:] == [
        "code 64 of a codebook of 64",
        "tokenized.dtype of its json is None",
        "its json has no 'tokenized', which names the image tokenizer",
    ]


def test_codes_are_not_encoded_again(tmp_path: Path) -> None:
    tokenized([write_pairs(tmp_path / "a.tar", count=2)], tmp_path / "codes")
    with pytest.raises(DataError, match="had 2 of 2 records rejected"):
        tokenized([tmp_path / "codes"], tmp_path / "out")
    assert {row["reason"] for row in rejects_of(tmp_path / "out")} == {"codes already, no picture"}
