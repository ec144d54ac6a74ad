"""Filters, ends and schedules as a run meets them: what is said, counted, refused and resumed."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_documents import CODEBOOK, WriteSource, random_documents
from test_loader import ROW, VOCABULARY, assert_same, data_config, documents_in

from emu35.config.data import (
    FilterConfig,
    Interpolation,
    Packing,
    SourceConfig,
    TokenDataConfig,
)
from emu35.data.filter import apply_filter
from emu35.data.loader import TokenLoader
from emu35.data.source import Source
from emu35.errors import DataError
from emu35.tokens.document import Document, Image, Text
from emu35.tokens.serialize import Modality, serialize
from emu35.tokens.text import TextTokenizer


def loader_of(
    data: TokenDataConfig,
    *,
    rank: int = 0,
    size: int = 1,
    batch: int = 8,
    steps: int | None = None,
    told: list[str] | None = None,
) -> TokenLoader:
    return TokenLoader(
        data=data,
        vocabulary=VOCABULARY,
        seed=7,
        global_batch_size=batch,
        micro_batch_size=1,
        dp_rank=rank,
        dp_size=size,
        message=print if told is None else told.append,
        steps=steps,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures with text, and texts of which some are longer than a row."""
    from emu35.config.tokenizer import TokenizerConfig
    from emu35.data.shards import ShardMeta
    from emu35.data.writer import ShardWriter
    from emu35.tokens.text import build_text_tokenizer

    tokenizer = build_text_tokenizer(TokenizerConfig(codebook_size=CODEBOOK))
    root = tmp_path_factory.mktemp("mixture")
    texts = [[Text(f"line {n} " * (40 if n % 6 == 0 else 3))] for n in range(30)]
    for name, documents in (("scenes", random_documents(40, seed=1)), ("text", texts)):
        meta = ShardMeta(source=name, kind="bytes", n_text=256, codebook_size=CODEBOOK)
        with ShardWriter(folder=root / name, meta=meta, shard_bytes=30_000) as writer:
            for number, parts in enumerate(documents):
                sequence = serialize(Document(list(parts)), tokenizer)
                writer.append(sequence, document_id=str(number))
    return {name: root / name for name in ("scenes", "text")}


sources_strategy = st.fixed_dictionaries(
    {
        "schedule": st.dictionaries(st.integers(1, 4), st.sampled_from([0.0, 0.3, 2.0])),
        "filter": st.none() | st.just(FilterConfig(min_tokens=20)),
        "packing": st.sampled_from([None, *Packing]),
    }
)


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    scenes=sources_strategy,
    text=sources_strategy,
    epochs=st.sampled_from([None, 0.5, 1.5]),
    between=st.sampled_from(list(Interpolation)),
    prefetch=st.integers(0, 3),
    lives=st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(0, 2)), min_size=1, max_size=3
    ),
)
def test_the_global_stream_is_the_same_however_often_the_ranks_change(
    folders: dict[str, Path],
    scenes: dict[str, Any],
    text: dict[str, Any],
    epochs: float | None,
    between: Interpolation,
    prefetch: int,
    lives: list[tuple[int, int]],
) -> None:
    """Each life has its own number of ranks, and resumes from what the one before saved."""
    data = data_config(folders, schedule=between, prefetch_steps=0)
    data.sources["scenes"] = SourceConfig(path=str(folders["scenes"]), epochs=epochs, **scenes)
    data.sources["text"] = SourceConfig(path=str(folders["text"]), **{**text, "schedule": {}})
    steps = sum(count for _, count in lives)
    with loader_of(data) as whole:
        expected = [(whole.next_step(), whole.counts()) for _ in range(steps)]
    state: dict[str, Any] | None = None
    made = 0
    for size, count in lives:
        # Only the first one runs ahead, which none of the others may notice.
        ranks = [
            loader_of(replace(data, prefetch_steps=0 if rank else prefetch), rank=rank, size=size)
            for rank in range(size)
        ]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        for _ in range(count):
            parts = [rank.next_step() for rank in ranks]
            batches, counts = expected[made]
            assert_same([batch for part in parts for batch in part], batches)
            assert all(rank.counts() == counts for rank in ranks)
            made += 1
        states = [rank.state_dict() for rank in ranks]
        assert all(found == states[0] for found in states)
        state = json.loads(json.dumps(states[0]))
        for rank in ranks:
            rank.close()


def test_counts_are_those_of_the_rows_handed_out(folders: dict[str, Path]) -> None:
    data = data_config(folders, open_bins=2)
    tokens: Counter[str] = Counter()
    counts: dict[str, float] = {}
    with loader_of(data) as loader:
        names = [source.name for source in loader.sources]
        for _ in range(6):
            used = 0
            for batch in loader.next_step():
                for start, end in documents_in(batch, row=0):
                    # A document's last token has no label; that of its first tells the source.
                    tokens[names[int(batch.label_source[0, start])]] += end - start
                    used += end - start
            counts = loader.counts()
            assert counts["fill"] == pytest.approx(used / (8 * ROW))
            for name in names:
                assert counts[f"tokens/{name}"] == tokens[name]
    for source in loader.sources:
        passes = counts[f"epoch/{source.name}"]
        assert passes == pytest.approx(tokens[source.name] / source.length.sum())
        # Of documents, about as large a part has come as of tokens.
        assert counts[f"documents/{source.name}"] / len(source) == pytest.approx(passes, abs=0.35)


def test_every_token_of_a_limited_run_comes_once_under_its_document(
    folders: dict[str, Path],
) -> None:
    """Documents that are cut as well; no picture is; and the end says what to do."""
    data = data_config(folders)
    for source in data.sources.values():
        source.epochs = 1.0
    told: list[str] = []
    pieces: list[tuple[int, ...]] = []
    end = ""
    loader = loader_of(data, batch=1, told=told)
    with loader:
        for _ in range(10_000):
            try:
                (batch,) = loader.next_step()
            except DataError as error:
                end = str(error)
                break
            pieces += [tuple(batch.tokens[0, a:b].tolist()) for a, b in documents_in(batch, row=0)]
        with pytest.raises(DataError, match="the data has ended"):
            loader.next_step()
    assert "raise data.sources.NAME.epochs" in end
    assert [note.split(" before")[0] for note in sorted(told)] == [
        f"source {source.name!r} ended after 1 epochs ({int(source.length.sum()):,} tokens)"
        for source in loader.sources
    ]
    left = Counter(pieces)
    for source in loader.sources:
        for document in range(len(source)):
            rest = tuple(source.words(document)[0].tolist())
            while rest:
                piece = next(p for p in left if left[p] and rest[: len(p)] == p)
                left[piece] -= 1
                rest = rest[len(piece) :]
    assert not left.total()
    assert all(p.count(VOCABULARY.boi) == p.count(VOCABULARY.eoi) for p in pieces)
    counts = loader.counts()
    assert counts["documents/text"] == 30
    assert counts["epoch/scenes"] == counts["epoch/text"] == 1.0


def test_a_run_that_its_data_cannot_last_is_refused_at_the_start(folders: dict[str, Path]) -> None:
    data = data_config(folders)
    data.sources["scenes"].epochs = 1.0
    data.sources["text"].max_tokens = 500
    total = int(Source(name="scenes", path=folders["scenes"]).length.sum()) + 500
    enough = total // (8 * ROW)
    loader_of(data, steps=enough, told=[]).close()
    with pytest.raises(DataError, match=rf"hold about {total:,} tokens.*at most {enough}"):
        loader_of(data, steps=2 * enough)
    told: list[str] = []
    loader_of(data, steps=enough + 1, told=told).close()
    assert "may stop before its last step" in told[-1]
    data.sources["text"].max_tokens = None
    loader_of(data, steps=1000 * enough, told=[]).close()


def test_a_source_of_ratio_zero_is_opened_only_if_its_schedule_needs_it(
    folders: dict[str, Path],
) -> None:
    data = data_config(folders)
    data.sources["text"] = SourceConfig(path="missing", ratio=0.0)
    data.sources["later"] = SourceConfig(path=str(folders["text"]), ratio=0.0, schedule={2: 1.0})
    data.sources["scenes"].schedule = {2: 0.0}
    with loader_of(data) as loader:
        assert [source.name for source in loader.sources] == ["later", "scenes"]
        seen: list[dict[str, float]] = []
        for _ in range(5):
            loader.next_step()
            seen.append(loader.counts())
    assert [counts["tokens/later"] > 0 for counts in seen] == [False, False, True, True, True]
    # What lay in open bins still comes out; nothing of it is drawn any more.
    assert seen[4]["tokens/scenes"] == seen[3]["tokens/scenes"]


@pytest.fixture
def mixed(write_source: WriteSource) -> Path:
    picture = Image(np.zeros((4, 4), int))
    parts = [
        [Text("a")],
        [Text("b" * 50)],
        [picture],
        [Text("c" * 50), picture],
        [picture, picture, picture],
    ]
    return write_source("mixed", parts)


@pytest.mark.parametrize(
    ("bounds", "kept", "words"),
    [
        ({"min_tokens": 20}, [1, 2, 3, 4], "1 of 5 documents are left out: 1 by filter.min_tokens"),
        ({"max_tokens": 20}, [0], "4 by filter.max_tokens=20"),
        ({"min_pictures": 1, "max_pictures": 1}, [2, 3], "2 by filter.min_pictures=1, 1 by filter"),
        ({"max_visual_share": 0.4}, [0, 1, 3], "2 by filter.max_visual_share=0.4"),
        ({"min_visual_share": 0.4}, [2, 4], "3 by filter.min_visual_share=0.4"),
    ],
)
def test_a_filter_keeps_what_lies_within_its_bounds(
    mixed: Path, bounds: dict[str, Any], kept: list[int], words: str
) -> None:
    source = Source(name="mixed", path=mixed)
    filtered = apply_filter(source, bounds=FilterConfig(**bounds))
    assert np.flatnonzero(filtered.keep).tolist() == kept
    assert filtered.left_out is not None
    assert words in filtered.left_out


@settings(deadline=None, max_examples=30)
@given(low=st.floats(0, 1), high=st.floats(0, 1), few=st.integers(0, 2), many=st.integers(0, 90))
def test_a_filter_is_what_its_bounds_say_of_each_document(
    folders: dict[str, Path], low: float, high: float, few: int, many: int
) -> None:
    source = Source(name="scenes", path=folders["scenes"])
    bounds = FilterConfig(
        min_visual_share=low, max_visual_share=high, max_pictures=few, min_tokens=many
    )
    keep = apply_filter(source, bounds=bounds).keep
    for document in range(len(source)):
        share = float(np.mean(source.codes(document) == Modality.VISUAL))
        fits = low <= share <= high and len(source.spans(document)) <= few
        assert keep[document] == (fits and source.length[document] >= many)


def test_a_filter_is_told_obeyed_and_part_of_the_position(
    mixed: Path, tokenizer: TextTokenizer
) -> None:
    data = data_config({"mixed": mixed})
    data.sources["mixed"].filter = FilterConfig(max_pictures=0)
    told: list[str] = []
    with loader_of(data, told=told) as loader:
        batches = loader.next_step()
        state = loader.state_dict()
    assert told == [
        f"source 'mixed' ({mixed}): 3 of 5 documents are left out: 3 by filter.max_pictures=0"
    ]
    short, long = (
        serialize(Document([Text(text)]), tokenizer).tokens.tolist() for text in ("a", "b" * 50)
    )
    found = [
        batch.tokens[0, a:b].tolist() for batch in batches for a, b in documents_in(batch, row=0)
    ]
    assert all(tokens in (short, long) for tokens in found)
    data.sources["mixed"].filter = None
    with (
        loader_of(data) as other,
        pytest.raises(DataError, match="filter of source 'mixed' was max_pictures=0 and is none"),
    ):
        other.load_state_dict(state)
    data.sources["mixed"].filter = FilterConfig(min_tokens=1000)
    with pytest.raises(DataError, match=r"5 by filter\.min_tokens=1000\. That leaves nothing"):
        loader_of(data)
