"""Packed shards: what is in them, and that training on them is training on the documents."""

import os
import struct
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import (
    ROW,
    VOCABULARY,
    config_of,
    documents_in,
    first_rows,
    loader_of,
    offline,
    pack,
    rows_of,
    varied,
    write_shards,
)
from shard_documents import CODEBOOK

from emu35.config.data import FilterConfig, Overlong, Packing, SourceConfig, ValidationConfig
from emu35.config.tokenizer import TokenizerConfig
from emu35.data.index import build_index, index_path, verify_index
from emu35.data.loader import ValidationSet
from emu35.data.packed_items import PackedItems
from emu35.data.shards import decode_runs
from emu35.data.source import Source
from emu35.errors import DataError
from emu35.tokens.document import Part, Text
from emu35.tokens.serialize import TokenSequence
from emu35.tokens.text import TextTokenizer, build_text_tokenizer

LONG = 400
"""Characters of documents of which some are longer than a row."""


@pytest.fixture(autouse=True, scope="module")
def _no_sync() -> Iterator[None]:
    """Nothing here is about power cuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def test_stock_webdataset_reads_rows_and_their_pieces(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    written = write_shards(tmp_path / "a", varied(40, seed=1), tokenizer=tokenizer)
    summary = pack(tmp_path / "a", out=tmp_path / "packed", shard_bytes=9000)
    shards = sorted(str(path) for path in (tmp_path / "packed").glob("*.tar"))
    assert len(shards) == summary.shards > 1
    stock: Any = webdataset
    found = list(stock.WebDataset(shards, shardshuffle=False, empty_check=False).decode())
    assert len(found) == summary.rows
    ids: list[str] = []
    for sample in found:
        tokens = np.frombuffer(sample["tok"], "<u4")
        codes = decode_runs(np.frombuffer(sample["mod"], "<u4"))
        assert sample["json"]["tokens"] == len(tokens) == len(codes) <= ROW
        for piece in sample["json"]["pieces"]:
            part = slice(piece["start"], piece["start"] + piece["tokens"])
            document = written[piece["id"]]
            np.testing.assert_array_equal(tokens[part], document.tokens)
            np.testing.assert_array_equal(codes[part], document.modality)
            ids.append(piece["id"])
    assert sorted(ids) == sorted(written)


def check_rows(source: Source, *, written: dict[str, TokenSequence]) -> dict[str, int]:
    """Check every row against the documents; how many pieces each of these became."""
    ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for row in range(len(source)):
        words, codes = source.words(row)[0], source.codes(row)
        assert len(words) <= ROW
        spans = {(int(start), int(end)) for start, end in source.spans(row)}
        end = 0
        for piece in source.pieces(row):
            assert piece.start == end
            end += piece.tokens
            document = written[piece.id]
            assert piece.source == piece.id.split("/")[0]
            assert piece.of == len(document.tokens)
            part = slice(piece.first, piece.first + piece.tokens)
            np.testing.assert_array_equal(words[piece.start : end], document.tokens[part])
            np.testing.assert_array_equal(codes[piece.start : end], document.modality[part])
            opened = np.flatnonzero(words[piece.start : end] == VOCABULARY.boi) + piece.start
            closed = np.flatnonzero(words[piece.start : end] == VOCABULARY.eoi) + piece.start + 1
            pictures = set(zip(opened.tolist(), closed.tolist(), strict=True))
            assert pictures <= spans
            spans -= pictures
            ranges[piece.id].append((part.start, part.stop))
        assert end == len(words)
        assert not spans
    for id, parts in ranges.items():
        ends = [0, *(stop for _, stop in sorted(parts))]
        assert [start for start, _ in sorted(parts)] == ends[:-1]
        assert ends[-1] == len(written[id].tokens)
    return {id: len(parts) for id, parts in ranges.items()}


@settings(deadline=None, max_examples=15)
@given(
    counts=st.lists(st.integers(1, 25), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    longest=st.sampled_from([12, 30, LONG]),
    overlong=st.sampled_from([Overlong.cut, Overlong.drop]),
    shard_bytes=st.sampled_from([9000, 2**20]),
)
def test_every_token_of_every_document_is_in_one_row_once(
    counts: list[int], seed: int, longest: int, overlong: Overlong, shard_bytes: int
) -> None:
    tokenizer = build_text_tokenizer(TokenizerConfig(codebook_size=CODEBOOK))
    with tempfile.TemporaryDirectory() as folder:
        written: dict[str, TokenSequence] = {}
        inputs: list[Path] = []
        for number, count in enumerate(counts):
            inputs.append(Path(folder) / f"in{number}")
            # Short enough for dropping never to leave nothing.
            documents = [[Text("short")], *varied(count, seed=seed, longest=longest)]
            written |= write_shards(inputs[-1], documents, tokenizer=tokenizer)
        out = Path(folder) / "out"
        summary = pack(*inputs, out=out, overlong=overlong, shard_bytes=shard_bytes)
        source = Source(name="out", path=out)
        pieces = check_rows(source, written=written)
        items = PackedItems(source=source, limit=ROW)
        for shard in sorted(out.glob("*.tar")):
            verify_index(shard)

    too_long = {id for id, document in written.items() if len(document.tokens) > ROW}
    kept = set(written) if overlong is Overlong.cut else set(written) - too_long
    assert set(pieces) == kept
    assert {id for id, count in pieces.items() if count > 1} == too_long & kept
    assert summary.documents == len(kept)
    assert summary.cut == len(too_long & kept)
    assert summary.dropped == len(written) - len(kept)
    assert (len(items), summary.pieces) == (sum(pieces.values()),) * 2
    assert len(source) == summary.rows
    assert int(items.is_beginning.sum()) == len(kept)
    tokens = sum(len(written[id].tokens) for id in kept)
    assert summary.tokens == int(source.length.sum()) == tokens
    assert summary.fill == pytest.approx(tokens / (len(source) * ROW))


@pytest.mark.parametrize("longest", [30, LONG])
def test_training_on_packed_rows_is_training_on_those_packed_in_memory(
    tmp_path: Path, tokenizer: TextTokenizer, longest: int
) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "scenes"
    write_shards(plain, varied(70, seed=4, longest=longest), tokenizer=tokenizer)
    summary = pack(plain, out=packed, shard_bytes=9000)
    assert summary.shards > 1
    expected = first_rows(offline(plain, name="scenes"), count=summary.rows)
    assert len(set(expected)) == summary.rows
    # Nothing has to be set for a folder that lies packed.
    found = first_rows(config_of({"scenes": packed}), count=summary.rows)
    assert Counter(found) == Counter(expected)
    assert found == first_rows(offline(packed, name="scenes"), count=summary.rows)


def test_the_order_is_the_same_as_in_memory_where_all_is_one_window(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "scenes"
    write_shards(plain, varied(50, seed=5), tokenizer=tokenizer)
    rows = pack(plain, out=packed).rows
    streams = [
        first_rows(offline(path, name="scenes", shuffle_window=1000), count=3 * rows)
        for path in (plain, packed)
    ]
    assert streams[0] == streams[1]


def test_an_online_epoch_has_the_same_documents(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    write_shards(plain, varied(60, seed=6, longest=LONG), tokenizer=tokenizer)
    rows = pack(plain, out=packed).rows
    with loader_of(config_of({"a": packed}), batch=rows) as loader:
        found = [piece for batch in loader.next_step() for piece in documents_in(batch, row=0)]
    with loader_of(config_of({"a": plain}), batch=1) as loader:
        online: list[list[int]] = []
        while loader.state_dict()["sources"]["a"]["epoch"] < 2:
            online += documents_in(loader.next_step()[0], row=0)
    assert {tuple(piece) for piece in found} == {tuple(piece) for piece in online}
    # What is cut off a document may be its last token alone.
    assert max(Counter(tuple(piece) for piece in found if len(piece) > 4).values()) == 1


def test_rows_of_a_shard_are_read_near_each_other(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    write_shards(tmp_path / "a", varied(120, seed=7), tokenizer=tokenizer)
    rows = pack(tmp_path / "a", out=tmp_path / "packed", shard_bytes=9000).rows
    source = Source(name="packed", path=tmp_path / "packed")
    shard_of = {
        tuple(source.words(row)[0].tolist()): int(source.shard[row]) for row in range(len(source))
    }
    data = config_of({"a": tmp_path / "packed"}, shuffle_window=1)
    with loader_of(data, batch=rows) as loader:
        rows = [batch.tokens[0] for batch in loader.next_step()]
    order = [shard_of[tuple(row[row != VOCABULARY.pad].tolist())] for row in rows]
    changes = sum(one != two for one, two in pairwise(order))
    assert changes == len(source.shards) - 1 > 1


def test_a_row_is_checked_once_for_all_its_pieces(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    write_shards(tmp_path / "a", [[Text("x")]] * 30, tokenizer=tokenizer)
    pack(tmp_path / "a", out=tmp_path / "packed")
    source = Source(name="packed", path=tmp_path / "packed")
    items = PackedItems(source=source, limit=ROW)
    pairs = list(source.read(items.document))
    assert len(pairs) == 30
    assert len({id(pair) for pair in pairs}) == len(source) < 30


def test_mixed_with_a_plain_source_it_resumes_on_other_ranks(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    write_shards(tmp_path / "a", varied(60, seed=8), tokenizer=tokenizer)
    write_shards(tmp_path / "b", varied(60, seed=9), tokenizer=tokenizer)
    pack(tmp_path / "a", out=tmp_path / "packed", shard_bytes=9000)
    data = config_of({"a": tmp_path / "packed", "b": tmp_path / "b"})
    with loader_of(data, batch=8) as loader:
        steps = [rows_of(loader.next_step()) for _ in range(9)]
    with loader_of(data, batch=8) as loader:
        for _ in range(5):
            loader.next_step()
        state = loader.state_dict()
    joined: list[list[tuple[bytes, ...]]] = [[] for _ in range(4)]
    for rank in range(2):
        with loader_of(data, batch=8, dp_rank=rank, dp_size=2) as loader:
            loader.load_state_dict(state)
            for step in joined:
                step += rows_of(loader.next_step())
    assert joined == steps[5:]


@pytest.mark.parametrize("documents", [1, 9, 1000])
def test_validation_takes_the_rows_as_they_are(
    tmp_path: Path, tokenizer: TextTokenizer, documents: int
) -> None:
    write_shards(tmp_path / "a", varied(40, seed=10), tokenizer=tokenizer)
    pack(tmp_path / "a", out=tmp_path / "packed")
    source = Source(name="packed", path=tmp_path / "packed")
    expected = [
        [
            source.words(row)[0][piece.start : piece.start + piece.tokens].tolist()
            for piece in source.pieces(row)
        ]
        for row in range(len(source))
    ]
    found: dict[int, list[list[int]]] = {}
    for rank in range(2):
        validation = ValidationSet(
            config=ValidationConfig(path=str(tmp_path / "packed"), max_documents=documents),
            data=config_of({}),
            vocabulary=VOCABULARY,
            micro_batch_size=1,
            dp_rank=rank,
            dp_size=2,
        )
        for batch in validation:
            found[batch.sample_ids[0]] = documents_in(batch, row=0)
    found.pop(-1, None)
    whole = [found[row] for row in range(len(found))]
    assert sum(len(row) for row in whole) == min(documents, 40)
    assert whole[:-1] == expected[: len(whole) - 1]
    assert whole[-1] == expected[len(whole) - 1][: len(whole[-1])]


def test_what_was_cut_is_left_out_or_refused_where_training_says_so(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    documents: list[list[Part]] = [[Text(f"{n} " + "y" * 20)] for n in range(12)]
    documents.insert(3, [Text("z" * 200)])
    written = write_shards(tmp_path / "a", documents, tokenizer=tokenizer)
    pack(tmp_path / "a", out=tmp_path / "packed")
    data = config_of({"a": tmp_path / "packed"}, overlong=Overlong.drop)
    said: list[str] = []
    with loader_of(data, batch=4, message=said.append) as loader:
        state = loader.state_dict()
        assert state["sources"]["a"]["items"] == 12
        seen: set[tuple[int, ...]] = set()
        while loader.state_dict()["sources"]["a"]["epoch"] < 1:
            seen |= {tuple(p) for b in loader.next_step() for p in documents_in(b, row=0)}
    short = {tuple(d.tokens.tolist()) for d in written.values() if len(d.tokens) <= ROW}
    assert seen == short
    assert "1 of 13 documents are longer than data.sequence_length=96" in said[0]
    assert "the longest has 202 tokens" in said[0]
    assert "data.overlong=drop" in said[0]

    data = config_of({"a": tmp_path / "packed"}, overlong=Overlong.refuse)
    with pytest.raises(DataError, match=r"1 of 13 documents .*cut when they were packed.*drop"):
        loader_of(data, batch=4)


def test_rows_of_another_length_are_refused(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    write_shards(tmp_path / "a", varied(9, seed=1), tokenizer=tokenizer)
    pack(tmp_path / "a", out=tmp_path / "packed")
    for length in (64, 128):
        message = rf"rows of 96 tokens, but data\.sequence_length={length}; set .*=96, or pack"
        with pytest.raises(DataError, match=message):
            loader_of(config_of({"a": tmp_path / "packed"}, sequence_length=length), batch=1)


def test_packing_online_is_refused_for_what_lies_packed(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    write_shards(tmp_path / "a", varied(9, seed=1), tokenizer=tokenizer)
    pack(tmp_path / "a", out=tmp_path / "packed")
    source = SourceConfig(path=str(tmp_path / "packed"), packing=Packing.online)
    with pytest.raises(DataError, match=r"data\.sources\.a\.packing=online, .* leave packing out"):
        loader_of(config_of({}, sources={"a": source}), batch=1)


def test_a_filter_is_refused_for_what_lies_packed(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    write_shards(tmp_path / "a", varied(9, seed=1), tokenizer=tokenizer)
    pack(tmp_path / "a", out=tmp_path / "packed")
    source = SourceConfig(path=str(tmp_path / "packed"), filter=FilterConfig(min_tokens=5))
    with pytest.raises(DataError, match=r"data\.sources\.a\.filter .* filter the folders"):
        loader_of(config_of({}, sources={"a": source}), batch=1)


def test_documents_are_counted_not_their_rows_nor_their_pieces(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    write_shards(tmp_path / "a", varied(30, seed=11, longest=LONG), tokenizer=tokenizer)
    summary = pack(tmp_path / "a", out=tmp_path / "packed")
    assert summary.cut > 0
    with loader_of(config_of({"a": tmp_path / "packed"}), batch=summary.rows) as loader:
        loader.next_step()
        counts = loader.counts()
    assert counts["documents/a"] == 30
    assert counts["tokens/a"] == summary.tokens
    assert counts["epoch/a"] == 1


def test_packed_and_plain_shards_do_not_share_a_folder(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    write_shards(tmp_path / "a", varied(9, seed=1), tokenizer=tokenizer)
    pack(tmp_path / "a", out=tmp_path / "packed")
    for path in (tmp_path / "a").iterdir():
        path.rename(tmp_path / "packed" / path.name)
    with pytest.raises(DataError, match=r"holds documents and .* holds rows packed to 96 tokens"):
        Source(name="a", path=tmp_path / "packed")


def test_plain_shards_are_written_as_before_there_were_packed_ones(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    write_shards(tmp_path / "a", varied(9, seed=1), tokenizer=tokenizer)
    pack(tmp_path / "a", out=tmp_path / "packed")
    plain, packed = tmp_path / "a/a-000000.tar", tmp_path / "packed/packed-000000.tar"
    versions = [
        struct.unpack_from("<8sI", index_path(shard).read_bytes())[1] for shard in (plain, packed)
    ]
    # An emu35 that knows nothing of rows refuses the second.
    assert versions == [3, 4]
    for shard, told in ((plain, False), (packed, True)):
        assert (b'"packed"' in shard.read_bytes()) == told
        assert (b"pieces" in index_path(shard).read_bytes()) == told


def test_the_index_of_packed_rows_can_be_built_again(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    write_shards(tmp_path / "a", varied(30, seed=1, longest=LONG), tokenizer=tokenizer)
    pack(tmp_path / "a", out=tmp_path / "packed")
    shard = tmp_path / "packed/packed-000000.tar"
    before = index_path(shard).read_bytes()
    index_path(shard).unlink()
    build_index(shard)
    assert index_path(shard).read_bytes() == before
