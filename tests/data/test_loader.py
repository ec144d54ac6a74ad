"""Batches: what is in them, that ranks agree, that a run resumes exactly, that errors are clear."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_documents import CODEBOOK, WriteSource, random_documents

from emu35.config.data import (
    Overlong,
    Packing,
    SourceConfig,
    TokenDataConfig,
    ValidationConfig,
)
from emu35.data.batch import Batch
from emu35.data.index import build_index, read_index
from emu35.data.loader import TokenLoader, ValidationSet
from emu35.data.shards import ShardMeta
from emu35.data.writer import ShardWriter
from emu35.errors import DataError
from emu35.tokens.document import Document, Image, Part, Text
from emu35.tokens.serialize import serialize
from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary

ROW = 96
VOCABULARY = Vocabulary(n_text=256, codebook_size=CODEBOOK)


def data_config(folders: dict[str, Path], **changes: Any) -> TokenDataConfig:
    sources = {name: SourceConfig(path=str(folder)) for name, folder in folders.items()}
    settings: dict[str, Any] = {
        "sequence_length": ROW,
        "sources": sources,
        "open_bins": 4,
        "shuffle_window": 8,
    }
    return TokenDataConfig(**{**settings, **changes})


def loader_of(
    data: TokenDataConfig, *, rank: int = 0, size: int = 1, micro: int = 2, batch: int = 8
) -> TokenLoader:
    return TokenLoader(
        data=data,
        vocabulary=VOCABULARY,
        seed=7,
        global_batch_size=batch,
        micro_batch_size=micro,
        dp_rank=rank,
        dp_size=size,
    )


@pytest.fixture
def data(write_source: WriteSource) -> TokenDataConfig:
    return data_config(
        {
            "scenes": write_source("scenes", random_documents(60, seed=1), shard_bytes=30_000),
            "text": write_source("text", [[Text(f"line {n} " * 9)] for n in range(25)]),
        }
    )


def stacked(batches: list[Batch], name: str) -> torch.Tensor:
    return torch.cat([getattr(batch, name) for batch in batches])


TENSORS = (
    "tokens",
    "labels",
    "label_modality",
    "label_valid",
    "label_source",
    "positions",
    "document_start",
)


def assert_same(one: list[Batch], two: list[Batch]) -> None:
    for name in TENSORS:
        torch.testing.assert_close(stacked(one, name), stacked(two, name), rtol=0, atol=0)
    ids = [[number for batch in batches for number in batch.sample_ids] for batches in (one, two)]
    assert ids[0] == ids[1]


def documents_in(batch: Batch, *, row: int) -> list[tuple[int, int]]:
    """Column ranges of the documents of a row."""
    starts = batch.document_start[row].tolist()
    first = sorted({start for start in starts if start < ROW})
    return [(start, start + starts.count(start)) for start in first]


def test_every_tensor_agrees_with_the_documents_it_was_made_from(
    write_source: WriteSource, tokenizer: TextTokenizer
) -> None:
    documents = random_documents(30, seed=3, longest=30)
    known = {
        tuple(sequence.tokens.tolist()): sequence.modality
        for sequence in (serialize(Document(parts), tokenizer) for parts in documents)
    }
    with loader_of(data_config({"a": write_source("a", documents)})) as loader:
        batches = loader.next_step()
    seen = 0
    for batch in batches:
        assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
        assert batch.label_modality.dtype == torch.uint8
        assert batch.label_valid.dtype == torch.bool
        for row in range(2):
            end = 0
            for start, end in documents_in(batch, row=row):
                seen += 1
                length = end - start
                tokens = batch.tokens[row, start:end].tolist()
                assert batch.labels[row, start : end - 1].tolist() == tokens[1:]
                assert batch.labels[row, end - 1] == VOCABULARY.pad
                assert batch.label_valid[row, start:end].tolist() == [True] * (length - 1) + [False]
                found = batch.label_modality[row, start : end - 1].numpy()
                np.testing.assert_array_equal(found, known[tuple(tokens)][1:])
                assert batch.positions[row, start:end].tolist() == list(range(length))
            assert (batch.tokens[row, end:] == VOCABULARY.pad).all()
            assert (batch.labels[row, end:] == VOCABULARY.pad).all()
            assert not batch.label_valid[row, end:].any()
            assert (batch.positions[row, end:] == 0).all()
            assert (batch.document_start[row, end:] == ROW).all()
    assert seen > 8


def test_labels_are_numbered_by_their_source(data: TokenDataConfig) -> None:
    with loader_of(data) as loader:
        names = [source.name for source in loader.sources]
        batches = loader.next_step()
    numbers: set[str] = set()
    for batch in batches:
        assert batch.label_source.dtype == torch.int16
        assert (batch.label_source[~batch.label_valid] == 0).all()
        for row in range(2):
            for start, end in documents_in(batch, row=row):
                text = bytes(t for t in batch.tokens[row, start:end].tolist() if t < 256)
                name = "text" if text.startswith(b"line") else "scenes"
                assert set(batch.label_source[row, start : end - 1].tolist()) == {names.index(name)}
                numbers.add(name)
    assert numbers == {"scenes", "text"}


def test_an_epoch_of_batches_holds_every_document_once(
    write_source: WriteSource, tokenizer: TextTokenizer
) -> None:
    documents = random_documents(50, seed=4, longest=30)
    folder = write_source("a", documents, shard_bytes=20_000)
    expected = sorted(serialize(Document(p), tokenizer).tokens.tolist() for p in documents)
    found: list[list[int]] = []
    with loader_of(data_config({"a": folder}, open_bins=1), batch=2) as loader:
        while len(found) < len(expected):
            for batch in loader.next_step():
                for row in range(2):
                    found += [
                        batch.tokens[row, a:b].tolist() for a, b in documents_in(batch, row=row)
                    ]
    # With one open bin nothing is held back, so the first documents out are the first epoch.
    assert sorted(found[: len(expected)]) == expected


def test_long_documents_come_in_pieces_that_join_to_the_whole(
    write_source: WriteSource, tokenizer: TextTokenizer
) -> None:
    first, second = (Image((np.arange(64).reshape(8, 8) + n) % CODEBOOK) for n in (0, 1))
    words = " ".join(str(number) for number in range(80))
    parts: list[Part] = [Text(words), first, Text("between " * 5), second, Text(words[::-1])]
    whole = serialize(Document(parts), tokenizer)
    folder = write_source("long", [parts])
    validation = ValidationSet(
        config=ValidationConfig(path=str(folder)),
        data=data_config({}),
        vocabulary=VOCABULARY,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
    )
    pieces = [
        batch.tokens[row, a:b].tolist()
        for batch in validation
        for row in range(1)
        for a, b in documents_in(batch, row=row)
    ]
    assert len(pieces) >= 5
    text = whole.tokens.tolist()
    # Numbers count up and pictures differ, so a piece occurs in one place only.
    places = sorted(
        (start, piece)
        for piece in pieces
        for start in range(len(text))
        if text[start : start + len(piece)] == piece
    )
    assert [token for _, piece in places for token in piece] == text
    boi, eoi = VOCABULARY.boi, VOCABULARY.eoi
    assert all(piece.count(boi) == piece.count(eoi) for piece in pieces)
    for batch in validation:
        labels = batch.labels[batch.label_valid]
        assert (labels != VOCABULARY.pad).all()


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_laid_end_to_end_are_the_one_rank_stream(
    data: TokenDataConfig, size: int, packing: Packing
) -> None:
    data.packing = packing
    with loader_of(data) as whole:
        expected = [whole.next_step() for _ in range(4)]
    ranks = [loader_of(data, rank=rank, size=size) for rank in range(size)]
    for step in expected:
        parts = [rank.next_step() for rank in ranks]
        assert_same([batch for part in parts for batch in part], step)
    states = [rank.state_dict() for rank in ranks]
    assert all(state == states[0] for state in states)
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_a_resumed_run_continues_bit_exactly_on_other_ranks(
    data: TokenDataConfig, cut: int, prefetch: int, packing: Packing
) -> None:
    data.prefetch_steps, data.packing = prefetch, packing
    with loader_of(data) as loader:
        for _ in range(cut):
            loader.next_step()
        time.sleep(0.05)  # lets the thread run ahead, which must not show in the state
        state = json.loads(json.dumps(loader.state_dict()))
        expected = [loader.next_step() for _ in range(3)]
    ranks = [loader_of(data, rank=rank, size=2) for rank in range(2)]
    for rank in ranks:
        rank.next_step()
        rank.load_state_dict(state)
    for step in expected:
        assert_same([batch for rank in ranks for batch in rank.next_step()], step)
    for rank in ranks:
        rank.close()


def test_the_order_of_sources_in_a_config_does_not_matter(data: TokenDataConfig) -> None:
    swapped = data_config({})
    swapped.sources = dict(reversed(data.sources.items()))
    with loader_of(data) as one, loader_of(swapped) as two:
        assert_same(one.next_step(), two.next_step())


def test_the_thread_ends_with_the_loader(data: TokenDataConfig) -> None:
    before = threading.active_count()
    loader = loader_of(data)
    loader.next_step()
    assert threading.active_count() == before + 1
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_an_edited_shard_stops_the_run_with_its_name(data: TokenDataConfig) -> None:
    shard = Path(data.sources["text"].path) / "text-000000.tar"
    index = read_index(shard)
    content = bytearray(shard.read_bytes())
    for word in index.token_word.tolist():
        content[4 * word + 4] ^= 1
    shard.write_bytes(content)
    with loader_of(data) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match=r"of text-000000\.tar .*changed"):
                loader.next_step()


def test_another_tokenizer_is_refused(data: TokenDataConfig) -> None:
    with pytest.raises(DataError, match=r"codebook_size=64, but this run has .*=1024; set token"):
        TokenLoader(
            data=data,
            vocabulary=Vocabulary(n_text=256, codebook_size=1024),
            seed=0,
            global_batch_size=1,
            micro_batch_size=1,
            dp_rank=0,
            dp_size=1,
        )


def test_pictures_of_two_image_tokenizers_are_refused(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    sequence = serialize(Document([Image(np.zeros((2, 2), int))]), tokenizer)
    for name in ("one", "two"):
        meta = ShardMeta(
            source=name, kind="bytes", n_text=256, codebook_size=CODEBOOK, vision=name * 10
        )
        with ShardWriter(folder=tmp_path / name, meta=meta) as writer:
            writer.append(sequence, document_id="x")
    with pytest.raises(DataError, match="different image tokenizers"):
        loader_of(data_config({name: tmp_path / name for name in ("one", "two")}))


def test_a_picture_longer_than_a_row_is_refused_with_the_remedy(write_source: WriteSource) -> None:
    picture = Image(np.zeros((12, 12), int))
    folder = write_source("big", [[Text("small")], [picture], [Text("t"), picture]])
    message = (
        r"2 documents with a picture longer than data\.sequence_length=96; the first is document 1"
        r" of big-000000\.tar with a picture of 163 tokens\. Raise data\.sequence_length"
    )
    with pytest.raises(DataError, match=message):
        loader_of(data_config({"big": folder}))


def long_and_short(write_source: WriteSource) -> Path:
    """Twelve documents; those with numbers 3, 7 and 11 are longer than a row."""
    lengths = [200 if n % 4 == 3 else 20 + n for n in range(12)]
    return write_source("mixed", [[Text("x" * length)] for length in lengths])


def test_overlong_documents_are_left_out_and_named(
    write_source: WriteSource,
) -> None:
    folder = long_and_short(write_source)
    data = data_config({"mixed": folder}, overlong=Overlong.drop, packing=Packing.offline)
    told: list[str] = []
    with TokenLoader(
        data=data,
        vocabulary=VOCABULARY,
        seed=0,
        global_batch_size=4,
        micro_batch_size=2,
        dp_rank=0,
        dp_size=1,
        message=told.append,
    ) as loader:
        batches = loader.next_step()
    text = (
        r"3 of 12 documents are longer than data\.sequence_length=96; the longest has 202 tokens,"
    )
    left_out, packed = told
    assert re.search(text + r" the first is document 3 of mixed-000000\.tar.*left out", left_out)
    assert re.search(r"'mixed': 9 pieces packed offline into \d rows of 96 tokens", packed)
    lengths = {
        b - a for batch in batches for row in range(2) for a, b in documents_in(batch, row=row)
    }
    assert lengths <= {22 + n for n in range(12) if n % 4 != 3}

    held_out = ValidationSet(
        config=ValidationConfig(path=str(folder), max_documents=8),
        data=data,
        vocabulary=VOCABULARY,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
        message=told.append,
    )
    assert "2 of 8 documents are longer" in told[-1]
    assert sum(len(documents_in(batch, row=0)) for batch in held_out) == 6


def test_overlong_documents_can_be_refused(write_source: WriteSource) -> None:
    folder = long_and_short(write_source)
    message = (
        r"3 of 12 documents are longer.*first is document 3 of mixed-000000\.tar\. Raise "
        r"data\.sequence_length to at least 202, or leave them out with data\.overlong=drop"
    )
    with pytest.raises(DataError, match=message):
        loader_of(data_config({"mixed": folder}, overlong=Overlong.refuse))
    short = data_config({"mixed": folder}, overlong=Overlong.refuse, sequence_length=202)
    loader_of(short).close()
    with pytest.raises(DataError, match="leaves nothing of this source"):
        loader_of(data_config({"mixed": folder}, overlong=Overlong.drop, sequence_length=16))


def test_a_changed_source_is_refused_on_resume(
    data: TokenDataConfig, write_source: WriteSource
) -> None:
    with loader_of(data) as loader:
        state = loader.state_dict()
    shards = sorted(Path(data.sources["scenes"].path).glob("*.tar"))
    shards[-1].unlink()
    shards[-1].with_suffix(".idx").unlink()
    with loader_of(data) as loader, pytest.raises(DataError, match="shards of source 'scenes'"):
        loader.load_state_dict(state)


def test_a_batch_moves_to_a_device(data: TokenDataConfig) -> None:
    with loader_of(data) as loader:
        batch = loader.next_step()[0]
    moved = batch.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in TENSORS)
    assert moved.sample_ids == batch.sample_ids


def validation_of(folder: Path, *, rank: int, size: int, documents: int) -> ValidationSet:
    return ValidationSet(
        config=ValidationConfig(path=str(folder), max_documents=documents),
        data=data_config({}),
        vocabulary=VOCABULARY,
        micro_batch_size=2,
        dp_rank=rank,
        dp_size=size,
    )


@pytest.mark.parametrize("documents", [1, 7, 100])
def test_validation_covers_its_documents_on_any_number_of_ranks(
    write_source: WriteSource, tokenizer: TextTokenizer, documents: int
) -> None:
    parts = random_documents(20, seed=8, longest=30)
    folder = write_source("held_out", parts)
    chosen = parts[:documents]
    expected = sorted(serialize(Document(p), tokenizer).tokens.tolist() for p in chosen)
    for size in (1, 3):
        ranks = [
            validation_of(folder, rank=rank, size=size, documents=documents) for rank in range(size)
        ]
        batches = [list(rank) for rank in ranks]
        assert len({len(found) for found in batches}) == 1
        assert all(len(rank) == len(found) for rank, found in zip(ranks, batches, strict=True))
        found = [
            batch.tokens[row, a:b].tolist()
            for rank in batches
            for batch in rank
            for row in range(2)
            for a, b in documents_in(batch, row=row)
        ]
        assert sorted(found) == expected


def test_rebuilding_an_index_does_not_change_the_stream(data: TokenDataConfig) -> None:
    with loader_of(data) as loader:
        expected = loader.next_step()
        state = loader.state_dict()
    for shard in Path(data.sources["scenes"].path).glob("*.tar"):
        build_index(shard)
    with loader_of(data) as loader:
        assert_same(loader.next_step(), expected)
        loader.load_state_dict(state)
