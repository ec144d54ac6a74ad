"""The tar itself: stock webdataset reads it, and it is whole or absent."""

import errno
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from shard_documents import CODEBOOK, WriteSource, random_documents

from emu35.data.shards import ShardMeta, decode_runs, encode_runs
from emu35.data.writer import ShardWriter
from emu35.errors import DataError
from emu35.tokens.document import Document, Image, Text
from emu35.tokens.serialize import TokenSequence, serialize
from emu35.tokens.text import TextTokenizer

META = ShardMeta(source="demo", kind="bytes", n_text=256, codebook_size=CODEBOOK)


def sequence_of(length: int) -> TokenSequence:
    return TokenSequence(np.arange(length, dtype=np.uint32) % 200, np.zeros(length, np.uint8))


def test_stock_webdataset_reads_tokens_modality_and_facts(
    write_source: WriteSource, tokenizer: TextTokenizer
) -> None:
    documents = random_documents(20, seed=1)
    folder = write_source("demo", documents, shard_bytes=12_000)
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    assert len(shards) > 1
    stock: Any = webdataset
    dataset = stock.WebDataset(shards, shardshuffle=False, empty_check=False).decode()
    found = list(dataset)
    assert len(found) == 20
    for number, (sample, parts) in enumerate(zip(found, documents, strict=True)):
        expected = serialize(Document(parts), tokenizer)
        np.testing.assert_array_equal(np.frombuffer(sample["tok"], "<u4"), expected.tokens)
        runs = np.frombuffer(sample["mod"], "<u4")
        np.testing.assert_array_equal(decode_runs(runs), expected.modality)
        facts = sample["json"]
        assert facts["id"] == str(number)
        assert facts["source"] == "demo"
        grids = [image[2:] for image in facts["images"]]
        assert grids == [list(p.codes_HW.shape) for p in parts if isinstance(p, Image)]
        for start, end, rows, columns in facts["images"]:
            assert expected.tokens[start] == tokenizer.vocabulary.boi
            assert expected.tokens[end - 1] == tokenizer.vocabulary.eoi
            assert end - start == rows * columns + rows + 2 + len(f"{rows}*{columns}")


def test_shards_of_earlier_versions_name_no_dtype() -> None:
    fields = json.loads(ShardMeta(source="x", kind="bytes", n_text=256, codebook_size=4).to_json())
    del fields["vision_dtype"]
    assert ShardMeta.from_json(json.dumps(fields)).vision_dtype is None


@given(st.lists(st.integers(0, 3), max_size=200))
def test_runs_decode_to_what_was_encoded(codes: list[int]) -> None:
    modality = np.array(codes, dtype=np.uint8)
    np.testing.assert_array_equal(decode_runs(encode_runs(modality)), modality)


def test_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with ShardWriter(folder=tmp_path / name, meta=META) as writer:
            writer.append(sequence_of(30), document_id="x")
    for name in ("demo-000000.tar", "demo-000000.idx"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_exception_keeps_complete_shards_and_discards_the_open_one(tmp_path: Path) -> None:
    def write() -> None:
        with ShardWriter(folder=tmp_path, meta=META, shard_bytes=20_000) as writer:
            while True:
                writer.append(sequence_of(1000), document_id="x")
                if len(writer.paths) == 2:
                    writer.append(sequence_of(10), document_id="y")
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"demo-00000{n}.{kind}" for n in (0, 1) for kind in ("idx", "tar")]


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer = ShardWriter(folder=tmp_path, meta=META)
    writer.append(sequence_of(30), document_id="x")
    with pytest.raises(DataError, match="no space left"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    size = META.vocabulary().size
    sequence = TokenSequence(np.array([size], np.uint32), np.zeros(1, np.uint8))
    with (
        ShardWriter(folder=tmp_path, meta=META) as writer,
        pytest.raises(DataError, match=f"'x' holds id {size}, outside the vocabulary"),
    ):
        writer.append(sequence, document_id="x")


def test_special_strings_in_text_open_no_picture(
    write_source: WriteSource, tokenizer: TextTokenizer
) -> None:
    folder = write_source("demo", [[Text("<|image start|>4*4<|image token|> hello")]])
    with tarfile.open(folder / "demo-000000.tar") as tar:
        file = tar.extractfile("000000-000000.json")
        assert file is not None
        assert json.load(file)["images"] == []
        file = tar.extractfile("000000-000000.tok")
        assert file is not None
        tokens = np.frombuffer(file.read(), "<u4")
    assert (tokens[1:-1] < tokenizer.vocabulary.n_text).all()


def test_a_source_name_that_is_no_file_name_is_refused(tmp_path: Path) -> None:
    meta = ShardMeta(source="../up", kind="bytes", n_text=256, codebook_size=CODEBOOK)
    with pytest.raises(DataError, match="cannot name a shard"):
        ShardWriter(folder=tmp_path, meta=meta)
