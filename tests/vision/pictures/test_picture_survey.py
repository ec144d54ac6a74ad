"""What is looked at again: metadata that changed, pictures that were mended, and what was not."""

import os
from pathlib import Path

import pytest
from drawn_pictures import encoded, plain, texture, words, write_tar

from emu35.config import ImageDataConfig, PictureFilterConfig, ScorerConfig
from emu35.config.images import MissingScore
from emu35.errors import DataError
from emu35.vision.pictures import PictureFile, Rejects, find_pictures
from emu35.vision.pictures.filters import Selection
from emu35.vision.pictures.readers import MetadataReader, SizeReader
from emu35.vision.pictures.select import select_pictures

COUNT = 8


def select(folder: Path, *filters: dict, cache: Path, memory: Path | None = None, **options):
    data = ImageDataConfig(
        resolution=32,
        decode_threads=2,
        filters=[PictureFilterConfig(**entry) for entry in filters],
        scorers={"taste": ScorerConfig(field="taste")},
        **options,
    )
    assert not list(data.problems())
    return select_pictures(
        find_pictures([folder], rejects=Rejects()),
        data=data,
        cache=cache,
        make_scorer=lambda name, config: pytest.fail(f"{name} is no scorer of these tests"),
        message=lambda text: None,
        memory=memory,
    )


def kept(selection: Selection) -> list[int]:
    return selection.kept.tolist()


TASTE = {"scorer": "taste", "min": 1}


def write_metadata(folder: Path, *, layout: str, tastes: list[int], when: int, **more) -> None:
    members = {f"{n}.json": words(taste=taste, **more) for n, taste in enumerate(tastes)}
    if layout == "files":
        for name, data in members.items():
            (folder / name).write_bytes(data)
            os.utime(folder / name, (when, when))
        return
    pictures = {f"{number}.png": plain(number) for number in range(len(tastes))}
    write_tar(folder / "all.tar", dict(sorted({**members, **pictures}.items())))
    os.utime(folder / "all.tar", (when, when))


@pytest.fixture(params=["files", "tar"])
def layout(request, tmp_path) -> str:
    (tmp_path / "data").mkdir()
    if request.param == "files":
        for number in range(COUNT):
            (tmp_path / "data" / f"{number}.png").write_bytes(plain(number))
    return request.param


def test_scores_of_metadata_that_changed_are_read_anew(layout, tmp_path, monkeypatch):
    folder, cache = tmp_path / "data", tmp_path / "scores"
    write_metadata(folder, layout=layout, tastes=[2] * COUNT, when=1000)
    assert kept(select(folder, TASTE, cache=cache)) == list(range(COUNT))
    # As long as before, byte for byte.
    write_metadata(folder, layout=layout, tastes=[0] * 3 + [2] * (COUNT - 3), when=2000)
    assert kept(select(folder, TASTE, cache=cache)) == list(range(3, COUNT))
    monkeypatch.setattr(MetadataReader, "read", lambda *_, **__: pytest.fail("known"))
    assert kept(select(folder, TASTE, cache=cache)) == list(range(3, COUNT))


def test_sizes_in_metadata_that_changed_are_read_anew(layout, tmp_path, monkeypatch):
    folder, wide = tmp_path / "data", {"scorer": "width", "min": 50}
    fields = {"cache": tmp_path / "scores", "width_field": "w", "height_field": "h"}
    write_metadata(folder, layout=layout, tastes=[0] * COUNT, when=1000, w=60, h=60)
    assert len(kept(select(folder, wide, **fields))) == COUNT
    write_metadata(folder, layout=layout, tastes=[0] * COUNT, when=2000, w=40, h=60)
    with pytest.raises(DataError, match=f"0 of {COUNT} pictures are used"):
        select(folder, wide, **fields)
    # Headers do not depend on metadata.
    square = {"scorer": "width", "max": 40}
    assert len(kept(select(folder, square, cache=tmp_path / "scores"))) == COUNT
    if layout == "files":
        write_metadata(folder, layout=layout, tastes=[0] * COUNT, when=3000, w=50, h=60)
        monkeypatch.setattr(SizeReader, "read", lambda *_, **__: pytest.fail("known"))
        assert len(kept(select(folder, square, cache=tmp_path / "scores"))) == COUNT


@pytest.fixture
def many(tmp_path) -> Path:
    """80 pictures, more than those whose bytes tell listings apart."""
    (tmp_path / "many").mkdir()
    for number in range(80):
        (tmp_path / "many" / f"{number:02d}.png").write_bytes(plain(number))
    return tmp_path / "many"


# None of the 32 whose bytes tell listings apart.
BROKEN = [1, 3, 4, 6, 8, 9, 11, 13, 14, 16, 18, 19]

SIDE = {"scorer": "min_side", "min": 1}
CONTRAST = {"scorer": "contrast_proxy", "min": 0}


def spoil(folder: Path, numbers: list[int]) -> dict[Path, bytes]:
    good = {folder / f"{number:02d}.png": b"" for number in numbers}
    for path in good:
        good[path] = path.read_bytes()
        path.write_bytes(bytes(len(good[path])))
    return good


def mend(good: dict[Path, bytes]) -> None:
    for path, data in good.items():
        path.write_bytes(data)


@pytest.mark.parametrize("bounds", [SIDE, CONTRAST])
def test_who_mends_broken_pictures_finds_them_used(many, tmp_path, bounds):
    folders = {"cache": tmp_path / "scores", "memory": tmp_path / "run"}
    good = spoil(many, BROKEN)
    for _ in range(2):
        with pytest.raises(DataError, match=r"12 of 80 pictures cannot be used .*mend them"):
            select(many, bounds, **folders)
    mend(good)
    assert len(kept(select(many, bounds, **folders))) == 80


@pytest.mark.parametrize("bounds", [SIDE, CONTRAST])
def test_a_run_goes_on_with_what_it_began_with_and_others_look_again(many, tmp_path, bounds):
    cache, run = tmp_path / "scores", tmp_path / "run"
    good = spoil(many, BROKEN[:3])
    first = select(many, bounds, cache=cache, memory=run)
    assert len(kept(first)) == 77
    mend(good)
    other = select(many, bounds, cache=cache, memory=tmp_path / "other")
    assert len(kept(other)) == 80
    resumed = select(many, bounds, cache=cache, memory=run)
    assert kept(resumed) == kept(first)
    assert resumed.broken == first.broken
    assert len(kept(select(many, bounds, cache=cache))) == 80
    (remembered,) = run.iterdir()
    remembered.write_bytes(remembered.read_bytes()[:20])
    with pytest.raises(DataError, match=r"unread-.*cannot be read .*delete it"):
        select(many, bounds, cache=cache, memory=run)
    remembered.unlink()
    assert len(kept(select(many, bounds, cache=cache, memory=run))) == 80
    assert not (tmp_path / "other").exists()  # nothing to remember


def test_a_disk_that_fails_for_a_moment_is_believed_by_that_run_alone(many, tmp_path, monkeypatch):
    cache, run, read = tmp_path / "scores", tmp_path / "run", PictureFile.read

    def failing(self, limit=None):
        if self.path.name == "01.png":
            raise OSError("the disk is asleep")
        return read(self, limit)

    monkeypatch.setattr(PictureFile, "read", failing)
    first = select(many, SIDE, cache=cache, memory=run)
    assert first.broken == {1: "the disk is asleep"}
    monkeypatch.setattr(PictureFile, "read", read)
    assert len(kept(select(many, SIDE, cache=cache, memory=tmp_path / "other"))) == 80
    assert kept(select(many, SIDE, cache=cache, memory=run)) == kept(first)


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Six pictures; the metadata of 1 are no JSON, those of 2 a link to nothing, and those of 3
    lack the number; 4 has none."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(encoded(texture(number)))
        (folder / f"{number}.json").write_bytes(words(taste=number + 1))
    (folder / "1.json").write_bytes(b"{ broken")
    (folder / "2.json").unlink()
    (folder / "2.json").symlink_to(folder / "nowhere.json")
    (folder / "3.json").write_bytes(words(other=1))
    (folder / "4.json").unlink()
    return folder


def test_metadata_that_cannot_be_read_are_the_reason_for_leaving_out(damaged, tmp_path):
    selection = select(damaged, TASTE, cache=tmp_path / "scores")
    assert kept(selection) == [0, 5]
    reasons = {Path(entry.picture).stem: entry.reason for entry in selection.left_out()}
    assert reasons["1"].startswith("taste: no score, its metadata cannot be read (Expecting")
    assert reasons["2"].startswith("taste: no score, its metadata cannot be read ([Errno 2] No")
    assert reasons["3"] == reasons["4"] == "taste: no score, its metadata have no number 'taste'"
    assert "2 with metadata that cannot be read" in selection.summary()
    again = select(damaged, TASTE, cache=tmp_path / "scores")
    assert [entry.reason for entry in again.left_out()] == list(reasons.values())
    with pytest.raises(DataError, match=r"1\.png: taste: no score, its metadata cannot be read"):
        select(damaged, {**TASTE, "missing": MissingScore.refuse}, cache=tmp_path / "scores")


def test_metadata_that_cannot_be_read_are_named_where_pictures_are_kept(damaged, tmp_path):
    selection = select(damaged, {**TASTE, "missing": MissingScore.keep}, cache=tmp_path / "scores")
    assert kept(selection) == list(range(6))
    rejects = Rejects()
    selection.reject_broken(rejects)
    assert sorted(rejects.reasons) == [f"metadata of {damaged / name}.png" for name in ("1", "2")]
    for reason in rejects.reasons.values():
        assert "its metadata cannot be read (" in reason
        assert reason.endswith("the picture is used")


def test_metadata_that_fail_for_a_moment_are_believed_by_that_run_alone(
    damaged, tmp_path, monkeypatch
):
    cache, run, read = tmp_path / "scores", tmp_path / "run", PictureFile.read_metadata

    def failing(self):
        if self.path.name == "5.png":
            raise OSError("the disk is asleep")
        return read(self)

    monkeypatch.setattr(PictureFile, "read_metadata", failing)
    assert kept(select(damaged, TASTE, cache=cache, memory=run)) == [0]
    monkeypatch.setattr(PictureFile, "read_metadata", read)
    assert kept(select(damaged, TASTE, cache=cache, memory=tmp_path / "other")) == [0, 5]
    assert kept(select(damaged, TASTE, cache=cache, memory=run)) == [0]
