"""An index serves the shard it was made for, and no other."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from shard_documents import WriteSource, random_documents

from emu35.data.index import build_index, index_path, read_index, verify_index
from emu35.data.source import Source
from emu35.errors import DataError
from emu35.tokens.document import Document
from emu35.tokens.serialize import Modality, serialize
from emu35.tokens.text import TextTokenizer

Damage = Callable[[Path, Path], None]


@pytest.fixture
def folder(write_source: WriteSource) -> Path:
    return write_source("demo", random_documents(30, seed=2))


@pytest.fixture
def shard(folder: Path) -> Path:
    return folder / "demo-000000.tar"


def flip_byte(path: Path, *, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def replace_shard(shard: Path, other: Path) -> None:
    shutil.copyfile(other, shard)


def truncate_shard(shard: Path, _: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 2048)


def rewrite_with_same_size(shard: Path, _: Path) -> None:
    # The digest a changed tar carries differs, whatever its size and time.
    data = bytearray(shard.read_bytes())
    data[-2048 + 512 : -2048 + 576] = b"0" * 64
    shard.write_bytes(data)


def damage_index(shard: Path, _: Path) -> None:
    flip_byte(index_path(shard), offset=200)


def cut_index(shard: Path, _: Path) -> None:
    os.truncate(index_path(shard), 10)


def lose_index(shard: Path, _: Path) -> None:
    index_path(shard).unlink()


def lose_shard(shard: Path, _: Path) -> None:
    shard.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace_shard, "replaced or cut short"),
        (truncate_shard, "replaced or cut short"),
        (rewrite_with_same_size, "the digests differ"),
        (damage_index, "is damaged"),
        (cut_index, "is damaged"),
        (lose_index, "has no index"),
        (lose_shard, "has no shard"),
    ],
)
def test_opening_refuses_what_does_not_match(
    folder: Path, shard: Path, write_source: WriteSource, damage: Damage, message: str
) -> None:
    other = write_source("other", random_documents(31, seed=3)) / "other-000000.tar"
    damage(shard, other)
    with pytest.raises(DataError, match=message) as caught:
        Source(name="demo", path=folder)
    assert "restore" in str(caught.value).lower() or "emu35 data index" in str(caught.value)


def test_an_edit_in_place_is_found_when_the_document_is_read(folder: Path, shard: Path) -> None:
    index = read_index(shard)
    flip_byte(shard, offset=4 * int(index.token_word[7]) + 5)
    source = Source(name="demo", path=folder)
    source.words(6)
    with pytest.raises(DataError, match=r"document 7 of demo-000000\.tar .*changed"):
        source.words(7)


@pytest.mark.parametrize("member", ["000000-000003.tok", "000000-000003.mod", "000000-000003.json"])
def test_verification_finds_an_edit_of_any_member(shard: Path, member: str) -> None:
    verify_index(shard)
    with tarfile.open(shard) as tar:
        offset = tar.getmember(member).offset_data
    flip_byte(shard, offset=offset)
    with pytest.raises(DataError, match="not a complete, unaltered token shard"):
        verify_index(shard)


def test_time_stamps_do_not_matter(folder: Path, shard: Path) -> None:
    os.utime(shard, (1, 1))
    os.utime(index_path(shard), (2, 2))
    assert len(Source(name="demo", path=folder)) == 30


def test_a_rebuilt_index_equals_the_lost_one(shard: Path) -> None:
    before = index_path(shard).read_bytes()
    index_path(shard).unlink()
    build_index(shard)
    assert index_path(shard).read_bytes() == before


def test_an_index_of_a_foreign_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, arcname="a.txt")
    with pytest.raises(DataError, match="not a complete, unaltered token shard"):
        build_index(path)
    assert not index_path(path).exists()


def test_a_source_gives_back_every_document(
    write_source: WriteSource, tokenizer: TextTokenizer
) -> None:
    documents = random_documents(40, seed=5)
    source = Source(name="many", path=write_source("many", documents, shard_bytes=9000))
    assert len(source.shards) > 3
    for number, parts in enumerate(documents):
        expected = serialize(Document(parts), tokenizer)
        np.testing.assert_array_equal(source.words(number)[0], expected.tokens)
        np.testing.assert_array_equal(source.codes(number), expected.modality)
        visual = int(np.count_nonzero(expected.modality == Modality.VISUAL))
        assert source.modality[number, Modality.VISUAL] == visual


def test_a_folder_of_source_folders_names_them(write_source: WriteSource, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_source(name, random_documents(2, seed=1))
    with pytest.raises(DataError, match="did you mean its folder one or two"):
        Source(name="x", path=tmp_path)


def test_missing_and_empty_folders_name_the_remedy(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(DataError, match="emu35 data ingest"):
            Source(name="x", path=folder)
