"""Statistics agree with the documents that were written."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_documents import WriteSource, random_documents

from emu35.data.stats import (
    SourceStats,
    count_source,
    histogram,
    packing_fill,
    source_of,
    stats_of,
    together,
)
from emu35.errors import DataError
from emu35.tokens.document import Document, Image, Text
from emu35.tokens.serialize import Modality, serialize
from emu35.tokens.text import TextTokenizer


def measured(folder: Path) -> SourceStats:
    source = source_of(folder)
    return stats_of(count_source(source, watch=lambda done: None), name=source.name)


def test_everything_is_counted(write_source: WriteSource, tokenizer: TextTokenizer) -> None:
    documents = random_documents(40, seed=1)
    found = measured(write_source("a", documents, shard_bytes=9000))
    sequences = [serialize(Document(parts), tokenizer) for parts in documents]
    images = [part for parts in documents for part in parts if isinstance(part, Image)]
    shapes = [np.shape(image.codes_HW) for image in images]
    assert found.shards > 3
    assert (found.documents, found.pictures) == (40, len(images))
    assert found.tokens == sum(map(len, sequences))
    assert found.modality == {
        code.name.lower(): sum(int(np.count_nonzero(s.modality == code)) for s in sequences)
        for code in Modality
    }
    assert found.longest == max(map(len, sequences))
    assert found.percentiles[50] in {len(s) for s in sequences}
    assert {(rows, columns): count for rows, columns, count in found.grids} == {
        shape: shapes.count(shape) for shape in shapes
    }
    counts = [count for _, _, count in found.grids]
    assert counts == sorted(counts, reverse=True)


@given(st.lists(st.integers(1, 300_000), min_size=1, max_size=40))
def test_every_length_lies_in_its_bin(lengths: list[int]) -> None:
    bins = histogram(np.array(lengths))
    assert [bin.high for bin in bins[:-1]] == [bin.low for bin in bins[1:]]
    for bin in bins:
        inside = [length for length in lengths if bin.low <= length < bin.high]
        assert (bin.documents, bin.tokens) == (len(inside), sum(inside))
    assert sum(bin.documents for bin in bins) == len(lengths)
    assert bins[0].documents
    assert bins[-1].documents


def test_sources_together_are_the_sum_of_them(write_source: WriteSource) -> None:
    folders = [write_source(name, random_documents(20, seed=n)) for n, name in enumerate("ab")]
    apart = [measured(folder) for folder in folders]
    counts = [count_source(source_of(folder), watch=lambda done: None) for folder in folders]
    whole = stats_of(together(counts), name="all")
    for name in ("shards", "documents", "pictures", "tokens"):
        assert getattr(whole, name) == sum(getattr(stats, name) for stats in apart)
    assert sum(count for _, _, count in whole.grids) == whole.pictures
    assert whole.longest == max(stats.longest for stats in apart)


def test_packing_is_measured_or_its_obstacle_named(write_source: WriteSource) -> None:
    halves = source_of(write_source("halves", [[Text("x" * 30)]] * 40))
    assert packing_fill(halves, sequence_length=64).share == 1.0
    assert packing_fill(halves, sequence_length=80).share == 64 / 80
    picture = Image(np.zeros((12, 12), int))
    large = packing_fill(source_of(write_source("large", [[picture]])), sequence_length=64)
    assert large.share is None
    assert "picture longer than data.sequence_length=64" in large.problem


def test_damaged_json_and_empty_folders_are_named(
    write_source: WriteSource, tmp_path: Path
) -> None:
    folder = write_source("a", [[Image(np.zeros((2, 2), int))]] * 3)
    source = source_of(folder)
    index, row = source.locate(1)
    shard = folder / index.path.name
    content = bytearray(shard.read_bytes())
    content[int(index.json_byte[row])] = ord("?")
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"JSON of document 1 of a-000000\.tar .*data validate"):
        measured(folder)
    with pytest.raises(DataError, match="emu35 data ingest"):
        measured(tmp_path / "none")
