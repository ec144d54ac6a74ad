"""Listing pictures: order, metadata beside them, damaged tars, and what a listing costs."""

import os
import tarfile
import tracemalloc

import numpy as np
import pytest
from drawn_pictures import plain, words, write_tar
from PIL import Image

from emu35.errors import DataError
from emu35.vision.pictures import PictureBatches, Rejects, SquarePictures, find_pictures
from emu35.vision.pictures.tars import key_of


def test_listings_follow_paths_part_by_part(tmp_path):
    names = ["b.png", "a/z.png", "a/b/c.png", "a.png", "a-1.png", "A.png", "a/0.jpeg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(plain(1))
    found = find_pictures([tmp_path], rejects=Rejects())
    assert [file.path for file in found] == sorted(tmp_path / name for name in names)


def test_patterns_are_expanded_in_order(tmp_path):
    for number in (2, 0, 1):
        write_tar(tmp_path / f"train-{number}.tar", {f"{number}.png": plain(number)})
    write_tar(tmp_path / "val-0.tar", {"9.png": plain(9)})
    found = find_pictures([tmp_path / "train-*.tar"], rejects=Rejects())
    assert [file.member for file in found] == ["0.png", "1.png", "2.png"]
    with pytest.raises(DataError, match=r"test-\*\.tar does not exist"):
        find_pictures([tmp_path / "test-*.tar"], rejects=Rejects())


def test_metadata_lie_beside_their_pictures(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "one.png").write_bytes(plain(1))
    (tmp_path / "files" / "one.json").write_bytes(words(score=1))
    (tmp_path / "files" / "two.png").write_bytes(plain(2))
    write_tar(
        tmp_path / "more.tar",
        {
            "a/3.json": words(score=3),  # before its picture
            "a/3.png": plain(3),
            "a/4.png": plain(4),
            "b/4.json": words(score=-1),  # another key
            "a/5.png": plain(5),
            "a/5.txt": b"a caption",
            "a/5.json": words(score=5),
        },
    )
    found = find_pictures([tmp_path], rejects=Rejects())
    assert [file.read_metadata().get("score") for file in found] == [1, None, 3, None, 5]
    assert [file.read() for file in found] == [plain(level) for level in range(1, 6)]
    assert found[1].read(limit=10) == plain(2)[:10]
    assert found[4].read(limit=10) == plain(5)[:10]


def test_metadata_that_are_none_are_told(tmp_path):
    (tmp_path / "one.png").write_bytes(plain(1))
    for junk in (b"{", b"[1]", b"\xff\xfe", b""):
        (tmp_path / "one.json").write_bytes(junk)
        (file,) = find_pictures([tmp_path], rejects=Rejects())
        with pytest.raises(ValueError):  # noqa: PT011 - JSON, UTF-8 and shape have one class
            file.read_metadata()


def test_metadata_that_are_a_link_to_nothing_are_told_to_who_asks(tmp_path):
    (tmp_path / "one.png").write_bytes(plain(1))
    (tmp_path / "one.json").symlink_to(tmp_path / "nowhere.json")
    (file,) = find_pictures([tmp_path], rejects=Rejects())
    assert file.read() == plain(1)
    with pytest.raises(FileNotFoundError):
        file.read_metadata()


def test_pictures_of_one_key_have_metadata_of_their_own(tmp_path):
    members = {
        "1.5.png": plain(1),
        "1.5.json": words(score=5),
        "1.6.png": plain(2),  # has none
        "1.7.png": plain(3),
        "1.7.json": words(score=7),
        "2.left.png": plain(4),  # share those of the key
        "2.json": words(score=2),
        "2.right.png": plain(5),
        "2.own.JSON": words(score=3),
        "2.own.png": plain(6),
    }
    write_tar(tmp_path / "dots.tar", members)
    found = find_pictures([tmp_path], rejects=Rejects())
    scores = {file.member: file.read_metadata().get("score") for file in found}
    assert scores == {
        "1.5.png": 5,
        "1.6.png": None,
        "1.7.png": 7,
        "2.left.png": 2,
        "2.right.png": 2,
        "2.own.png": 3,
    }


@pytest.mark.parametrize(
    ("name", "key"), [("a/b.c.jpg", "a/b"), ("b.jpg", "b"), ("a.d/b", "a.d/b"), ("x/.jpg", "x/")]
)
def test_keys_end_at_the_first_dot_of_the_last_part(name, key):
    assert key_of(name) == key


def test_a_damaged_header_in_the_middle_is_told(tmp_path):
    path = tmp_path / "more.tar"
    write_tar(path, {f"{number}.png": plain(number) for number in range(6)})
    with tarfile.open(path) as tar:
        third = tar.getmembers()[3]
    data = bytearray(path.read_bytes())
    data[third.offset : third.offset + 300] = os.urandom(300)
    path.write_bytes(data)
    rejects = Rejects()
    found = find_pictures([path], rejects=rejects)
    assert [file.member for file in found] == ["0.png", "1.png", "2.png"]
    assert list(rejects.reasons) == [str(path)]
    assert f"after 3 pictures: no header at byte {third.offset}" in rejects.reasons[str(path)]


def test_whole_tars_are_not_told(tmp_path):
    write_tar(tmp_path / "whole.tar", {"1.png": plain(1)})
    rejects = Rejects()
    find_pictures([tmp_path], rejects=rejects)
    assert not rejects.reasons


def test_a_listing_takes_names_and_numbers_and_no_picture(tmp_path):
    """2 MB in 1000 members: at most what is listed, and that is little."""
    bulk = b"x" * 2000
    write_tar(tmp_path / "many.tar", {f"{number:08d}.png": bulk for number in range(1000)})
    tracemalloc.start()
    found = find_pictures([tmp_path], rejects=Rejects())
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 1000
    assert found.nbytes < 1000 * 70
    assert kept < 1000 * 250
    assert peak < 1_000_000
    assert found.choose(np.array([7, 3]))[1].member == "00000003.png"


def test_no_more_batches_are_held_than_asked_for():
    asked = list[int]()

    class Counting:
        def sample(self, sample):
            asked.append(sample)
            return np.full((3, 1, 1), sample % 256, dtype=np.uint8)

    batches = PictureBatches(
        Counting(), global_batch_size=8, rank=1, ranks=2, micro_batch_size=2, threads=4, ahead=2
    )
    assert [batch[:, 0, 0, 0].tolist() for batch in batches.micro_batches(3)] == [
        [20, 21],
        [22, 23],
    ]
    batches.close()
    assert set(asked) <= {20, 21, 22, 23, *range(28, 32), *range(36, 40)}
    assert len(asked) == len(set(asked))


@pytest.fixture
def halves(tmp_path):
    """Pictures that are black on the left and white on the right."""
    for number in range(8):
        half = np.zeros((32, 32, 3), dtype=np.uint8)
        half[:, 16:] = 255
        Image.fromarray(half).save(tmp_path / f"{number}.png")
    return tmp_path


def mirrored(folder, *, flip: float, seed: int = 3, count: int = 64) -> list[bool]:
    rejects = Rejects()
    pictures = SquarePictures(
        find_pictures([folder], rejects=rejects),
        resolution=32,
        factor=8,
        seed=seed,
        rejects=rejects,
        flip=flip,
    )
    return [bool(pictures.sample(sample)[0, 0, 0] > 128) for sample in range(count)]


def test_flips_depend_on_seed_and_sample_alone(halves):
    found = mirrored(halves, flip=0.5)
    assert found == mirrored(halves, flip=0.5)
    assert found != mirrored(halves, flip=0.5, seed=4)
    assert 16 < sum(found) < 48
    assert not any(mirrored(halves, flip=0.0))
    assert all(mirrored(halves, flip=1.0))
    few = mirrored(halves, flip=0.2)
    assert all(more for more, less in zip(found, few, strict=True) if less)


def test_flips_change_no_crop(halves):
    rejects = Rejects()
    plain_, flipped = (
        SquarePictures(
            find_pictures([halves], rejects=rejects),
            resolution=32,
            factor=8,
            seed=3,
            rejects=rejects,
            crop=16,
            flip=flip,
        )
        for flip in (0.0, 1.0)
    )
    for sample in range(10):
        assert np.array_equal(plain_.sample(sample), flipped.sample(sample)[:, :, ::-1])
