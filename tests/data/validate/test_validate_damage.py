"""Whatever byte of a shard changes, its name is reported; shards beside it are still read."""

import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_documents import CODEBOOK, WriteSource, random_documents

from emu35.config.tokenizer import TokenizerConfig
from emu35.data.index import index_path
from emu35.data.shards import BLOCK, ShardMeta
from emu35.data.validate.folder import FolderReport, Tokenizers, shards_of, validate_folder
from emu35.data.validate.problem import Check, Problem
from emu35.data.writer import ShardWriter
from emu35.tokens.document import Document
from emu35.tokens.serialize import serialize
from emu35.tokens.text import build_text_tokenizer

DOCUMENTS = 6


def validated(folder: Path, *, threads: int = 1) -> tuple[FolderReport, list[Problem]]:
    """The report of a folder, and all problems in it."""
    found = list(
        validate_folder(
            folder,
            shards_of([folder])[folder],
            tokenizers=Tokenizers(table=None),
            threads=threads,
        )
    )
    assert [each.last for each in found] == [False] * (len(found) - 1) + [True]
    return found[-1].report, [problem for each in found for problem in each.problems]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of six documents; tests put back what they damage."""
    place = tmp_path_factory.mktemp("sound") / "demo"
    meta = ShardMeta(source="demo", kind="bytes", n_text=256, codebook_size=CODEBOOK)
    tokenizer = build_text_tokenizer(TokenizerConfig(codebook_size=CODEBOOK))
    for stem, seed in (("a", 1), ("b", 2)):
        with ShardWriter(folder=place, meta=meta, stem=stem) as writer:
            for number, parts in enumerate(random_documents(DOCUMENTS, seed=seed)):
                sequence = serialize(Document(parts), tokenizer)
                writer.append(sequence, document_id=f"{stem}{number}")
    return place


def regions(shard: Path) -> list[int]:
    """The first byte of every header, member and padding, and bytes of the end."""
    places: list[int] = []
    with tarfile.open(shard) as tar:
        for member in tar:
            places += [member.offset, member.offset + 124, member.offset_data]
            places += [member.offset_data + member.size]
    size = shard.stat().st_size
    return [*places, size - 1, size - BLOCK, size - 2 * BLOCK - 1]


SIZE = 4 * BLOCK * (3 * DOCUMENTS + 8)
"""More than a shard of these documents has, so that every byte of it may be drawn."""


@settings(max_examples=50, deadline=None)
@given(place=st.integers(0, SIZE), bit=st.integers(0, 7), name=st.sampled_from(["tar", "idx"]))
def test_a_changed_bit_anywhere_is_reported_with_its_shard(
    folder: Path, place: int, bit: int, name: str
) -> None:
    change(folder, file=folder / f"a-000000.{name}", place=place, bit=bit)


def test_a_changed_bit_in_every_region_is_reported_with_its_shard(folder: Path) -> None:
    shard = folder / "a-000000.tar"
    for place in regions(shard):
        change(folder, file=shard, place=place, bit=2)


def change(folder: Path, *, file: Path, place: int, bit: int) -> None:
    """Flip a bit, see that it is reported, and put it back."""
    content = file.read_bytes()
    place %= len(content)
    try:
        file.write_bytes(flipped(content, place=place, bit=bit))
        report, problems = validated(folder)
    finally:
        file.write_bytes(content)
    assert problems
    assert {problem.shard for problem in problems} == {"a-000000.tar"}
    assert (report.problems, report.damaged, report.shards) == (len(problems), 1, 2)
    assert report.documents >= DOCUMENTS, "the other shard was read"


def flipped(content: bytes, *, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_shard_cut_short_anywhere_is_reported(folder: Path, share: float) -> None:
    shard = folder / "a-000000.tar"
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[: int(share * len(content))])
        report, problems = validated(folder)
    finally:
        shard.write_bytes(content)
    assert {problem.shard for problem in problems} == {"a-000000.tar"}
    assert report.documents >= DOCUMENTS


def test_damage_inside_a_document_names_it(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = copy / "b-000000.tar"
    with tarfile.open(shard) as tar:
        place = tar.getmember("000000-000004.tok").offset_data + 4
    shard.write_bytes(flipped(shard.read_bytes(), place=place, bit=0))
    _, problems = validated(copy, threads=2)
    named = [problem for problem in problems if problem.document is not None]
    assert named
    assert {(p.document, p.key, p.id) for p in named} == {(4, "000000-000004", "b4")}
    assert named[0].check is Check.checksum
    assert "b-000000.tar, document 4 (000000-000004, id b4): its bytes changed" in str(named[0])


@pytest.mark.parametrize("threads", [1, 3])
def test_sound_shards_have_no_problem(folder: Path, threads: int) -> None:
    report, problems = validated(folder, threads=threads)
    assert problems == []
    assert (report.shards, report.documents, report.damaged) == (2, 2 * DOCUMENTS, 0)


def test_documents_are_checked_without_an_index_and_its_absence_is_said(
    folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    index_path(copy / "a-000000.tar").unlink()
    (copy / "b-000000.tar").unlink()
    report, problems = validated(copy)
    assert report.documents == DOCUMENTS
    assert [(problem.shard, problem.check) for problem in problems] == [
        ("a-000000.tar", Check.sidecar),
        ("b-000000.tar", Check.sidecar),
    ]
    assert "has no index" in problems[0].text
    assert "restore the shard" in problems[1].text


def test_an_index_of_other_documents_is_reported(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.copyfile(index_path(copy / "a-000000.tar"), index_path(copy / "b-000000.tar"))
    _, problems = validated(copy)
    assert [problem.shard for problem in problems] == ["b-000000.tar"]
    assert "emu35 data index" in problems[0].text


def test_ids_that_occur_twice_are_counted(write_source: WriteSource, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_source(name, random_documents(5, seed=3))
    for path in (tmp_path / "two").iterdir():
        shutil.copyfile(path, tmp_path / "one" / path.name)
    report, problems = validated(tmp_path / "one")
    assert problems == []
    duplicates = report.duplicates()
    assert duplicates is not None
    assert duplicates.documents == 5
    assert duplicates.first == "document 0 of one-000000.tar"
    assert duplicates.second == "document 0 of two-000000.tar"
    alone, _ = validated(tmp_path / "two")
    assert alone.duplicates() is None


def test_shards_of_two_tokenizers_in_a_folder_are_reported(tmp_path: Path) -> None:
    write_stems(tmp_path / "mixed", [("a", 64, "x" * 64), ("b", 99, "x" * 64), ("c", 64, "y" * 64)])
    _, problems = validated(tmp_path / "mixed")
    assert [(problem.shard, problem.check) for problem in problems] == [
        ("b-000000.tar", Check.folder),
        ("c-000000.tar", Check.folder),
    ]
    assert "99 codes" in problems[0].text
    assert "image tokenizer yyyy" in problems[1].text


def write_stems(folder: Path, stems: Sequence[tuple[str, int, str]]) -> None:
    for stem, codes, vision in stems:
        tokenizer = build_text_tokenizer(TokenizerConfig(codebook_size=codes))
        meta = ShardMeta(
            source="mixed", kind="bytes", n_text=256, codebook_size=codes, vision=vision
        )
        with ShardWriter(folder=folder, meta=meta, stem=stem) as writer:
            for number, parts in enumerate(random_documents(3, seed=4)):
                sequence = serialize(Document(parts), tokenizer)
                writer.append(sequence, document_id=f"{stem}{number}")


def test_a_folder_without_shards_is_a_problem_of_the_folder(tmp_path: Path) -> None:
    report, problems = validated(tmp_path / "none")
    assert (report.shards, report.problems) == (0, 1)
    assert problems[0].shard is None
    assert "does not exist" in str(problems[0])
