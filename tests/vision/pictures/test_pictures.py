"""Which picture comes when, how it is cut, and what becomes of broken ones."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from emu35.errors import DataError
from emu35.vision.pictures import (
    PictureBatches,
    Rejects,
    SquarePictures,
    find_pictures,
    fingerprint,
    picture_at,
    store,
)

RESOLUTION = 32


def png(level, size=(40, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    """Ten plain pictures of levels 0, 10, .. 90, half in a folder and half in a tar."""
    (tmp_path / "files").mkdir()
    for index in range(5):
        (tmp_path / "files" / f"{index}.png").write_bytes(png(10 * index))
        (tmp_path / "files" / f"{index}.txt").write_text("a caption")
    write_tar(tmp_path / "more.tar", {f"{i}.png": png(10 * i) for i in range(5, 10)})
    return tmp_path


def open_set(paths, *, rejects=None, seed=7, **options) -> SquarePictures:
    rejects = Rejects() if rejects is None else rejects
    return SquarePictures(
        find_pictures(paths, rejects=rejects),
        resolution=RESOLUTION,
        factor=16,
        seed=seed,
        rejects=rejects,
        **options,
    )


def level(picture) -> int:
    assert picture.shape == (3, RESOLUTION, RESOLUTION)
    return int(picture[0, 0, 0])


def test_folders_and_tars_are_found_in_a_fixed_order(folder):
    files = find_pictures([folder], rejects=Rejects())
    assert len(files) == 10
    assert files == find_pictures([folder], rejects=Rejects())
    members = [file.member for file in files if file.member]
    assert members == ["5.png", "6.png", "7.png", "8.png", "9.png"]
    assert files[-1].read() == png(90)


def test_places_without_pictures_are_named(tmp_path):
    with pytest.raises(DataError, match="no picture in"):
        find_pictures([tmp_path], rejects=Rejects())
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_pictures([tmp_path / "nowhere"], rejects=Rejects())
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"broken\.tar cannot be read"):
        find_pictures([tmp_path], rejects=Rejects())


def test_an_epoch_has_every_picture_once_and_epochs_differ():
    epochs = [[picture_at(e * 50 + i, seed=1, count=50) for i in range(50)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    assert epochs[0] != epochs[1]
    assert epochs[0] != [picture_at(i, seed=2, count=50) for i in range(50)]


def test_a_step_is_the_same_whatever_came_before(folder):
    fresh = PictureBatches(open_set([folder]), global_batch_size=4, rank=0, ranks=1)
    used = PictureBatches(open_set([folder]), global_batch_size=4, rank=0, ranks=1)
    for step in (1, 2, 3):
        used.step(step)
    assert np.array_equal(fresh.step(4), used.step(4))
    assert np.array_equal(fresh.step(2), used.step(2))
    fresh.close()
    used.close()


def test_ranks_share_the_global_batch(folder):
    whole = PictureBatches(open_set([folder]), global_batch_size=4, rank=0, ranks=1)
    parts = [
        PictureBatches(open_set([folder]), global_batch_size=4, rank=rank, ranks=2)
        for rank in range(2)
    ]
    for step in (1, 5):
        halves = [part.step(step) for part in parts]
        assert np.array_equal(np.concatenate(halves), whole.step(step))
    for batches in (whole, *parts):
        batches.close()


def test_memory_is_an_optimisation_only(folder):
    cached, streamed = open_set([folder]), open_set([folder], cache_bytes=0)
    for sample in range(25):
        assert np.array_equal(cached.sample(sample), streamed.sample(sample))


def test_square_pictures_are_used_whole_and_long_ones_cut(tmp_path):
    ramp = np.zeros((40, 160, 3), dtype=np.uint8)
    ramp[:, :, 0] = np.arange(160)
    Image.fromarray(ramp).save(tmp_path / "long.png")
    wide = open_set([tmp_path])
    middle = wide.centre(0)
    assert middle is not None
    assert middle.shape == (3, RESOLUTION, RESOLUTION)
    assert middle[0].mean() == pytest.approx(79.5, abs=2)
    starts = {int(wide.sample(sample)[0, 0, 0]) for sample in range(20)}
    assert len(starts) > 5
    assert min(starts) >= 38  # of a 4:1 picture the middle 2:1 is kept


def test_crops_lie_within_their_squares(tmp_path):
    values = np.arange(RESOLUTION * RESOLUTION, dtype=np.uint32).reshape(RESOLUTION, RESOLUTION)
    parts = [values % 256, values // 256, values * 0]
    Image.fromarray(np.stack(parts, axis=2).astype(np.uint8)).save(tmp_path / "unique.png")
    found = open_set([tmp_path], crop=16)
    corners = set()
    for sample in range(30):
        crop, square = found.sample(sample), found.square(sample)
        assert crop.shape == (3, 16, 16)
        corner = int(crop[0, 0, 0]) + 256 * int(crop[1, 0, 0])
        top, left = divmod(corner, RESOLUTION)
        assert np.array_equal(crop, square[:, top : top + 16, left : left + 16])
        corners.add((top, left))
    assert len(corners) > 20
    assert np.array_equal(found.sample(4), open_set([tmp_path], crop=16).sample(4))


def test_long_sides_of_any_proportion_give_the_same_square(tmp_path):
    for index, size in enumerate([(33, 32), (100, 67), (31, 97), (5, 400), (640, 480), (16, 16)]):
        (tmp_path / f"{index}.png").write_bytes(png(50, size))
    found = open_set([tmp_path])
    for index in range(len(found)):
        assert level(found.centre(index)) == 50


def test_broken_pictures_are_replaced_and_named(folder, tmp_path):
    (folder / "files" / "2.png").write_bytes(b"not a picture")
    (folder / "files" / "3.png").write_bytes(png(30)[:50])
    rejects = Rejects()
    found = open_set([folder], rejects=rejects)
    levels = {level(found.sample(sample)) for sample in range(10)}
    assert levels == {0, 10, 40, 50, 60, 70, 80, 90}
    assert found.centre(2) is None
    broken = [str(folder / "files" / name) for name in ("2.png", "3.png")]
    assert sorted(rejects.reasons) == broken
    assert "not an image" in rejects.reasons[broken[0]]


def test_truncated_tars_lose_only_what_is_missing(folder):
    data = (folder / "more.tar").read_bytes()
    with tarfile.open(folder / "more.tar") as tar:
        last = tar.getmembers()[-1]
    (folder / "more.tar").write_bytes(data[: last.offset_data + 20])
    rejects = Rejects()
    found = open_set([folder / "more.tar"], rejects=rejects)
    levels = {level(found.sample(sample)) for sample in range(5)}
    assert levels == {50, 60, 70, 80}
    assert set(rejects.reasons) == {str(folder / "more.tar"), f"{folder / 'more.tar'}!9.png"}
    assert "after 5 pictures" in rejects.reasons[str(folder / "more.tar")]


def test_training_stops_when_most_pictures_are_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "TOLERATED_REJECTS", 3)
    (tmp_path / "good.png").write_bytes(png(1))
    for index in range(20):
        (tmp_path / f"bad{index:02d}.png").write_bytes(b"x")
    found = open_set([tmp_path])
    batches = PictureBatches(found, global_batch_size=21, rank=0, ranks=1)
    with pytest.raises(DataError, match=r"4 of \d+ pictures cannot be used"):
        batches.step(1)
    batches.close()


def test_nothing_usable_is_an_error_not_a_loop(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(DataError, match="none of the 1 pictures"):
        open_set([tmp_path]).sample(0)


def test_fingerprint_tells_other_pictures(folder):
    before = fingerprint(find_pictures([folder], rejects=Rejects()))
    assert before == fingerprint(find_pictures([folder], rejects=Rejects()))
    (folder / "files" / "2.png").unlink()
    assert fingerprint(find_pictures([folder], rejects=Rejects())) != before


def test_fingerprint_takes_names_that_are_no_utf8(tmp_path):
    for name in (b"\xff.png", b"\xfe.png"):
        folder = tmp_path / name.hex()
        folder.mkdir()
        (folder / os.fsdecode(name)).write_bytes(png(1))
    one, other = (
        fingerprint(find_pictures([tmp_path / name], rejects=Rejects()))
        for name in (b"\xff.png".hex(), b"\xfe.png".hex())
    )
    assert one != other
