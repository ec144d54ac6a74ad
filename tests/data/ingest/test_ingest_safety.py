"""What an ingestion must never do: lose shards, trust lost ones, or delete those of others."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import dies_at
from ingest_inputs import (
    GreyLevels,
    documents_of,
    files_of,
    options_of,
    png,
    rejects_of,
    write_pairs,
)

from emu35.config.area import Area
from emu35.data.index import read_index
from emu35.data.ingest.ingest import ingest
from emu35.data.ingest.options import Existing, IngestOptions, PairOrder
from emu35.data.readers.discover import TextUnit
from emu35.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill, unlike a power cut, loses nothing for want of a sync; without them this is quick."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write_texts(folder: Path, *, first: int = 0) -> list[Path]:
    """Two files of lines, the first of which fills two shards of 9000 bytes."""
    folder.mkdir(exist_ok=True)
    paths = [folder / "a.txt", folder / "b.txt"]
    paths[0].write_text("".join(f"line {first + n}\n" for n in range(6)))
    paths[1].write_text("".join(f"other {first + n}\n" for n in range(2)))
    return paths


def texts_options(inputs: list[Path], out: Path, **changes: Any) -> IngestOptions:
    settings: dict[str, Any] = {"text_unit": TextUnit.lines, "shard_bytes": 9000, **changes}
    return options_of(inputs, out, **settings)


def lost_shards(out: Path) -> set[str]:
    """Shards that the manifest names as done and that are not whole."""
    lost: set[str] = set()
    manifest = out / ".ingest" / "manifest.json"
    if manifest.is_file():
        for entry in json.loads(manifest.read_text())["done"]:
            for name in entry["shards"]:
                try:
                    read_index(out / name)
                except DataError:
                    lost.add(name)
    return lost


def kill_everywhere(
    tmp_path: Path,
    *,
    prepare: Callable[[Path], None],
    options: Callable[[Path], IngestOptions],
    every: int = 1,
) -> None:
    """Kill at every change of the disk in turn, or at one in ``every``; each time the same command
    must finish the job."""
    start, clean = tmp_path / "start", tmp_path / "clean"
    start.mkdir()
    prepare(start)
    lost = lost_shards(start)
    shutil.copytree(start, clean)
    ingest(options(clean), encoder=None)
    change, killed = 1 - every, True
    while killed:
        change += every
        out = tmp_path / f"out{change}"
        shutil.copytree(start, out)
        killed = dies_at(change, work=lambda out=out: ingest(options(out), encoder=None))
        if killed:
            assert lost_shards(out) <= lost
            ingest(options(out), encoder=None)
        assert files_of(out) == files_of(clean), f"killed before change {change}"
        assert list(out.rglob("*.tmp")) == []
        shutil.rmtree(out)
    assert change > 20


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_first_run_survives_a_kill_at_any_change_of_the_disk(tmp_path: Path, every: int) -> None:
    inputs = write_texts(tmp_path / "in")
    kill_everywhere(
        tmp_path,
        prepare=lambda out: None,
        options=lambda out: texts_options(inputs, out),
        every=every,
    )


@pytest.mark.slow
def test_replacing_survives_a_kill_at_any_change_of_the_disk(tmp_path: Path) -> None:
    old = write_texts(tmp_path / "old", first=100)
    inputs = write_texts(tmp_path / "in")

    def prepare(out: Path) -> None:
        ingest(texts_options([old[0]], out, order=PairOrder.image_first), encoder=None)

    kill_everywhere(
        tmp_path,
        prepare=prepare,
        options=lambda out: texts_options(inputs, out, existing=Existing.replace),
    )


@pytest.mark.slow
def test_mending_a_lost_shard_survives_a_kill_at_any_change_of_the_disk(tmp_path: Path) -> None:
    inputs = write_texts(tmp_path / "in")

    def prepare(out: Path) -> None:
        ingest(texts_options(inputs, out), encoder=None)
        (out / "demo-000000.tar").unlink()

    kill_everywhere(tmp_path, prepare=prepare, options=lambda out: texts_options(inputs, out))


class WrongCodebook(GreyLevels):
    """An image tokenizer that turns out not to fit when it is opened."""

    def check(self) -> None:
        raise ConfigError("the codebook has 99 codes")


@pytest.mark.parametrize(
    ("encoder", "message"),
    [(None, "no image tokenizer was given"), (WrongCodebook(), "99 codes")],
)
def test_replacing_with_wrong_options_keeps_the_earlier_shards(
    tmp_path: Path, encoder: GreyLevels | None, message: str
) -> None:
    text, out = tmp_path / "x.txt", tmp_path / "out"
    text.write_text("fine on its own")
    pairs = write_pairs(tmp_path / "x.tar", count=4)
    ingest(options_of([pairs], out), encoder=GreyLevels())
    before = files_of(out)
    # The text alone could be done, and would have replaced everything.
    options = options_of([text, pairs], out, existing=Existing.replace)
    with pytest.raises((DataError, ConfigError), match=message):
        ingest(options, encoder=encoder)
    assert files_of(out) == before
    assert ingest(options_of([pairs], out), encoder=GreyLevels()).skipped == 1


def test_replacing_with_a_picture_found_midway_keeps_the_earlier_shards(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png(width=16, height=8, grey=40))
    lines = [{"text": "words"}, {"image": "p.png", "caption": "grey"}]
    path, out = tmp_path / "x.jsonl", tmp_path / "out"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    ingest(options_of([path], out), encoder=GreyLevels())
    before = files_of(out)
    with pytest.raises(DataError, match="no image tokenizer was given"):
        ingest(options_of([path], out, existing=Existing.replace), encoder=None)
    assert files_of(out) == before
    assert ingest(options_of([path], out), encoder=GreyLevels()).skipped == 1


def test_a_replacement_that_comes_to_nothing_keeps_the_earlier_shards(tmp_path: Path) -> None:
    good, out = write_pairs(tmp_path / "x.tar", count=6, bad=1), tmp_path / "out"
    ingest(options_of([good], out), encoder=GreyLevels())
    before = files_of(out)
    empty = tmp_path / "empty.txt"
    empty.write_text(" ")
    bad = write_pairs(tmp_path / "bad.tar", count=6, bad=6)
    replace: dict[str, Any] = {"existing": Existing.replace, "area": Area(least=4096, most=4096)}
    with pytest.raises(DataError, match=r"bad\.tar had 6 of 6 .* earlier shards were kept"):
        ingest(options_of([bad], out, **replace), encoder=GreyLevels())
    with pytest.raises(DataError, match=r"no document at all.* earlier shards were kept"):
        ingest(options_of([empty], out, max_rejects=1.0, **replace), encoder=GreyLevels())
    # Another reason to reject the pictures of the earlier ingestion.
    options = options_of([good], out, sequence_length=4, max_rejects=1.0, **replace)
    with pytest.raises(DataError, match="no document at all"):
        ingest(options, encoder=GreyLevels())
    assert files_of(out) == before
    assert ingest(options_of([good], out), encoder=GreyLevels()).skipped == 1
    assert [row["reason"] for row in rejects_of(out)] == ["not an image"]


def test_replacing_leaves_nothing_of_the_earlier_orders(tmp_path: Path) -> None:
    pairs, out = write_pairs(tmp_path / "x.tar", count=4), tmp_path / "out"
    ingest(options_of([pairs], out, order=PairOrder.both), encoder=GreyLevels())
    ingest(options_of([pairs], out, existing=Existing.replace), encoder=GreyLevels())
    assert list(files_of(out)) == ["demo-000000.idx", "demo-000000.tar"]


def cut_short(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def write_anew(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[::-1])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, "restore the shard"),
        (cut_short, "cut short"),
        (write_anew, "digests differ"),
        (lambda shard: shard.with_suffix(".idx").unlink(), "has no index"),
    ],
)
def test_a_rerun_does_inputs_again_whose_shards_are_lost_or_damaged(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    message: str,
) -> None:
    inputs = [write_pairs(tmp_path / f"{n}.tar", count=8, first=8 * n) for n in range(3)]
    out, settings = tmp_path / "out", {"shard_bytes": 9000}
    ingest(options_of(inputs, out, **settings), encoder=GreyLevels())
    before = files_of(out)
    assert len(before) > 2 * len(inputs)  # several shards an input
    manifest = json.loads((out / ".ingest" / "manifest.json").read_text())
    shard = manifest["done"][1]["shards"][1]
    harm(out / shard)
    encoder = GreyLevels()
    summary = ingest(options_of(inputs, out, **settings), encoder=encoder)
    assert (summary.skipped, sum(encoder.calls)) == (2, 8)
    assert files_of(out) == before
    said = capsys.readouterr().err
    assert "1.tar is ingested again" in said
    assert shard in said
    assert message in said


def test_a_lost_shard_of_an_input_not_given_is_an_error_that_loses_no_more(tmp_path: Path) -> None:
    inputs = write_texts(tmp_path / "in")
    out = tmp_path / "out"
    ingest(texts_options(inputs, out), encoder=None)
    (out / "demo-000000.tar").unlink()
    before = files_of(out)
    with pytest.raises(DataError, match=r"demo-000000\.tar.*a\.txt.*Give these inputs, too"):
        ingest(texts_options(inputs[1:], out), encoder=None)
    assert files_of(out) == before


def test_an_unreadable_shard_is_no_reason_to_delete_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = write_texts(tmp_path / "in")
    out = tmp_path / "out"
    ingest(texts_options(inputs, out), encoder=None)
    before = files_of(out)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "demo-000000.idx":
            raise PermissionError(13, "Permission denied")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(DataError, match=r"demo-000000.*Permission denied"):
            ingest(texts_options(inputs, out), encoder=None)
    assert files_of(out) == before


@pytest.mark.parametrize("existing", list(Existing))
def test_shards_merged_in_by_hand_are_refused_and_kept(tmp_path: Path, existing: Existing) -> None:
    inputs = write_texts(tmp_path / "in")
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    ingest(texts_options(write_texts(tmp_path / "more", first=50), elsewhere), encoder=None)
    ingest(texts_options(inputs[:1], out), encoder=None)
    for kind in ("tar", "idx"):
        shutil.copy(elsewhere / f"demo-000000.{kind}", out / f"demo-000002.{kind}")
        shutil.copy(elsewhere / f"demo-000001.{kind}", out / f"merged-000001.{kind}")
    before = files_of(out)
    options = texts_options(inputs, out, existing=existing)
    with pytest.raises(DataError, match=r"demo-000002\.idx, demo-000002\.tar\. Move them to"):
        ingest(options, encoder=None)
    assert files_of(out) == before
    # The remedy works: under another name they are left alone and read with the others.
    for kind in ("tar", "idx"):
        (out / f"demo-000002.{kind}").rename(out / f"merged-000000.{kind}")
    ingest(options, encoder=None)
    assert len(documents_of(out)) == 8 + 6


def test_shards_merged_in_while_an_input_is_read_are_not_overwritten(tmp_path: Path) -> None:
    inputs = [write_pairs(tmp_path / f"{n}.tar", count=4, first=4 * n) for n in range(2)]
    out = tmp_path / "out"

    class Meanwhile(GreyLevels):
        def encode(self, pictures: Any) -> Any:
            out.joinpath("demo-000000.tar").write_bytes(b"precious")
            return super().encode(pictures)

    with pytest.raises(DataError, match="did not write"):
        ingest(options_of(inputs, out), encoder=Meanwhile())
    assert (out / "demo-000000.tar").read_bytes() == b"precious"
