"""Which paths can be named for pictures: each gives some, and none of them twice."""

import pytest
from drawn_pictures import plain, write_tar

from emu35.errors import DataError
from emu35.vision.pictures import Rejects, find_pictures


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "a.png").write_bytes(plain(1))
    (tmp_path / "data" / "sub" / "b.png").write_bytes(plain(2))
    write_tar(tmp_path / "data" / "c.tar", {"c.png": plain(3)})
    return tmp_path / "data"


def names(*paths, rejects=None) -> list[str]:
    found = find_pictures(paths, rejects=Rejects() if rejects is None else rejects)
    return [file.member or file.path.name for file in found]


@pytest.mark.parametrize("kind", ["tar.gz", "tgz", "tar.zst"])
def test_a_compressed_tar_is_to_be_unpacked(folder, kind):
    (folder / f"d.{kind}").write_bytes(b"compressed")
    with pytest.raises(DataError, match=rf"no picture in .*/d\.{kind} .*unpack it to a \.tar"):
        names(folder / "a.png", folder / f"d.{kind}")
    rejects = Rejects()
    assert names(folder, rejects=rejects) == ["a.png", "c.png", "b.png"]
    assert list(rejects.reasons) == [str(folder / f"d.{kind}")]


def test_every_path_that_is_named_has_pictures(folder):
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("no picture")
    write_tar(folder / "texts.tar", {"1.txt": b"no picture"})
    for name in ("empty", "notes.txt", "texts.tar", "*.t?t"):
        with pytest.raises(DataError) as error:
            names(folder / "a.png", folder / name)
        text = str(error.value)
        assert text.startswith(f"no picture in {folder / name}; expected files ending in .avif")
        assert "tars or folders of them" in text
    # A pattern as a whole, not everything that it happens to match.
    assert names(folder / "*") == ["a.png", "c.png", "b.png"]


def test_nothing_is_named_twice(folder):
    (folder.parent / "link").symlink_to(folder)
    (folder.parent / "link.tar").symlink_to(folder / "c.tar")
    a, sub = folder / "a.png", folder / "sub"
    for paths in (
        [folder, a],
        [a, folder],
        [folder, sub],
        [sub / "b.png", folder],
        [folder, folder / "*.tar"],
        [folder, folder.parent / "link"],
        [folder.parent / "link" / "a.png", folder],
        [folder, folder.parent / "link.tar"],
        [a, a],
        [folder / "*.png", a],
        [folder / "sub" / ".." / "a.png", a],
    ):
        with pytest.raises(DataError, match="used twice; name one of them") as error:
            names(*paths)
        assert str(error.value).count(str(folder.parent)) == 2
    assert names(sub, a, folder / "c.tar") == ["b.png", "a.png", "c.png"]


def test_links_between_neighbours_are_nothing_named_twice(folder):
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "d.png").write_bytes(plain(4))
    (folder / "other").symlink_to(folder.parent / "other")  # not followed
    assert names(folder, folder / "other") == ["a.png", "c.png", "b.png", "d.png"]
    (folder.parent / "data2").mkdir()
    (folder.parent / "data2" / "e.png").write_bytes(plain(5))
    assert names(folder, folder.parent / "data2")[-1] == "e.png"


def test_hidden_files_and_folders_are_left_out(folder):
    for name in (".ipynb_checkpoints", "sub/.thumbs/deep"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.png").write_bytes(plain(9))
    (folder / ".a.png").write_bytes(plain(9))
    (folder / "c.tar").unlink()
    write_tar(folder / "c.tar", {"./._c.png": b"of another system", "./c.png": plain(3)})
    assert names(folder) == ["a.png", "./c.png", "b.png"]
    # Who names them wants them, and they are not there twice.
    assert names(folder, folder / ".ipynb_checkpoints")[-1] == "x.png"
    assert names(folder / ".a.png") == [".a.png"]


def test_pictures_that_are_links_to_nothing_are_told(folder):
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    rejects = Rejects()
    assert names(folder, rejects=rejects) == ["a.png", "c.png", "b.png"]
    assert "No such file" in rejects.reasons[str(folder / "gone.png")]
