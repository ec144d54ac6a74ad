"""Shards behind a URL give the same stream as local ones, through a bounded cache."""

import json
import multiprocessing
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from shard_documents import CODEBOOK, WriteSource, random_documents
from shard_server import Served, serve

from emu35.config.data import (
    CacheConfig,
    Damaged,
    Packing,
    SourceConfig,
    TokenDataConfig,
    ValidationConfig,
)
from emu35.data import storage
from emu35.data.cache import ShardCache, Unreachable
from emu35.data.index import read_index
from emu35.data.loader import TokenLoader, ValidationSet
from emu35.data.place import Url, name_of, place_of
from emu35.data.source import Source
from emu35.data.storage import RemoteFolder
from emu35.errors import ConfigError, DataError
from emu35.stages import data as commands
from emu35.stages.data_inspect import InspectOptions, inspect
from emu35.stages.data_stats import StatsOptions, stats
from emu35.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(n_text=256, codebook_size=CODEBOOK)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)


@pytest.fixture
def folder(write_source: WriteSource) -> Path:
    """About six shards."""
    return write_source("far", random_documents(60, seed=1), shard_bytes=30_000)


@pytest.fixture
def served(folder: Path) -> Generator[Served, None, None]:
    with serve(folder) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(folder=str(tmp_path / "cache"))


def remote(served: Served, cache: CacheConfig, **options) -> Source:
    return Source(name="far", path=place_of(served.url), cache=cache, **options)


def everything(source: Source) -> list[list[int]]:
    return [words.tolist() for words, _ in source.read(np.arange(len(source)))]


def copies(cache: CacheConfig) -> list[Path]:
    assert cache.folder is not None
    return sorted(Path(cache.folder).glob("*.tar"))


def loader_of(
    path: str,
    cache: CacheConfig,
    *,
    packing: Packing = Packing.online,
    message: Callable[[str], None] = print,
) -> TokenLoader:
    data = TokenDataConfig(
        sequence_length=96,
        open_bins=4,
        shuffle_window=8,
        cache=cache,
        packing=packing,
        sources={"far": SourceConfig(path=path)},
    )
    return TokenLoader(
        data=data,
        vocabulary=VOCABULARY,
        seed=7,
        global_batch_size=4,
        micro_batch_size=4,
        dp_rank=0,
        dp_size=1,
        message=message,
    )


@pytest.mark.parametrize("kind", ["http", "memory"])
def test_the_stream_is_that_of_local_shards_and_resumes_from_either(
    folder: Path, served: Served, cache: CacheConfig, kind: str
) -> None:
    url = served.url
    if kind == "memory":
        url = "memory://bucket/far/"
        store = fsspec.filesystem("memory")
        for path in folder.iterdir():
            store.pipe_file(f"/bucket/far/{path.name}", path.read_bytes())
    with loader_of(str(folder), cache) as near, loader_of(url, cache) as far:
        for _ in range(12):
            (one,), (two,) = near.next_step(), far.next_step()
            assert torch.equal(one.tokens, two.tokens)
            assert torch.equal(one.label_modality, two.label_modality)
        state = json.loads(json.dumps(near.state_dict()))
        assert far.state_dict() == state
        (expected,) = near.next_step()
    with loader_of(url, cache) as far:
        far.load_state_dict(state)
        assert torch.equal(far.next_step()[0].tokens, expected.tokens)
    validation = ValidationSet(
        config=ValidationConfig(path=url, max_documents=5),
        data=TokenDataConfig(sequence_length=96, cache=cache),
        vocabulary=VOCABULARY,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
    )
    assert validation.source.name == "far"
    assert sum(int(batch.label_valid.sum()) for batch in validation) > 0


def test_local_shards_are_not_copied(folder: Path, cache: CacheConfig) -> None:
    assert everything(Source(name="near", path=folder, cache=cache))
    assert cache.folder is not None
    assert not Path(cache.folder).exists()


def test_a_tar_comes_when_it_is_read_and_only_once(served: Served, cache: CacheConfig) -> None:
    source = remote(served, cache)
    assert copies(cache) == []
    last = len(source) - 1
    source.words(last)
    source.words(last - 1)
    assert served.whole["far-000000.tar"] == 0
    assert served.whole[source.shards[-1].path.name] == 1
    assert len(copies(cache)) == 1
    before = served.asked
    everything(remote(served, cache))
    everything(remote(served, cache))
    tars = [name for name in served.whole if name.endswith(".tar")]
    assert len(tars) == len(source.shards)
    assert all(served.whole[name] == 1 for name in tars)
    assert served.asked > before


def test_the_cache_stays_below_its_bound_and_open_maps_stay_whole(
    folder: Path, served: Served, cache: CacheConfig
) -> None:
    expected = everything(Source(name="near", path=folder))
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    cache.bytes = 2 * largest
    source = remote(served, cache)
    assert len(source.shards) >= 5
    first, _ = source.words(0)
    kept = first.tolist()
    order = np.random.default_rng(0).permutation(len(source))
    for document in order.tolist():
        assert source.words(document)[0].tolist() == expected[document]
        assert sum(path.stat().st_size for path in copies(cache)) <= cache.bytes
    assert first.tolist() == kept
    assert len(copies(cache)) >= 1


def test_the_copy_used_least_recently_goes_first(served: Served, cache: CacheConfig) -> None:
    whole = remote(served, cache)
    cache.bytes = whole.shards[0].tar_bytes + 2 * max(shard.tar_bytes for shard in whole.shards)
    source = remote(served, cache)
    for shard in range(len(source.shards)):
        source.words(0)
        source.words(int(source.first_document[shard]))
    # In use all the time, the first was never brought again.
    assert served.whole["far-000000.tar"] == 1
    assert len(copies(cache)) < len(source.shards)


def test_threads_and_sources_share_a_small_cache(
    folder: Path, served: Served, cache: CacheConfig
) -> None:
    expected = everything(Source(name="near", path=folder))
    cache.bytes = 2 * max(path.stat().st_size for path in folder.glob("*.tar"))
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            source = remote(served, cache)
            for document in random.Random(seed).choices(range(len(source)), k=25):
                if source.words(document)[0].tolist() != expected[document]:
                    wrong.append(document)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cache.folder is not None
    assert not list(Path(cache.folder).glob(".*.tmp"))


def _read_all(url: str, folder: str, answers) -> None:
    source = Source(name="far", path=place_of(url), cache=CacheConfig(folder=folder))
    answers.put(sum(sum(tokens) for tokens in everything(source)))


@pytest.mark.multiproc
def test_processes_share_one_download(folder: Path, served: Served, cache: CacheConfig) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=_read_all, args=(served.url, cache.folder, answers))
        for _ in range(2)
    ]
    for rank in ranks:
        rank.start()
    found = [answers.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    expected = sum(sum(tokens) for tokens in everything(Source(name="near", path=folder)))
    assert found == [expected, expected]
    assert {served.whole[path.name] for path in folder.glob("*.tar")} == {1}


def test_a_shard_written_again_is_never_served_from_an_old_copy(
    served: Served, folder: Path, cache: CacheConfig, write_source: WriteSource
) -> None:
    before = everything(remote(served, cache))
    other = write_source("other", random_documents(20, seed=9), shard_bytes=30_000)
    for suffix in ("tar", "idx"):
        shutil.copyfile(other / f"other-000000.{suffix}", folder / f"far-000000.{suffix}")
    after = everything(remote(served, cache))
    assert after == everything(Source(name="near", path=folder))
    assert after != before


def test_a_tar_that_changed_alone_is_noticed(
    served: Served, folder: Path, cache: CacheConfig
) -> None:
    opened = remote(served, cache)
    shutil.copyfile(folder / "far-000001.tar", folder / "far-000000.tar")
    with pytest.raises(DataError, match=r"far-000000\.tar is not the one its index was made for"):
        opened.words(0)
    assert served.whole["far-000000.tar"] == 2  # brought twice before it is believed
    assert copies(cache) == []
    with pytest.raises(DataError, match=r"far-000000\.tar .*its index was made for"):
        remote(served, cache)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_copy_that_went_bad_is_brought_again(
    served: Served, folder: Path, cache: CacheConfig, damage: str
) -> None:
    expected = everything(remote(served, cache))
    copy = copies(cache)[0]
    data = bytearray(copy.read_bytes())
    if damage == "cut":
        del data[-512:]
    else:
        data[4 * int(remote(served, cache).shards[0].token_word[3])] ^= 4
    copy.write_bytes(data)
    assert everything(remote(served, cache)) == expected
    assert served.whole["far-000000.tar"] == 2
    # Where the shard itself is altered, another copy does not help.
    far = bytearray((folder / "far-000000.tar").read_bytes())
    far[4 * int(remote(served, cache).shards[0].token_word[3])] ^= 4
    (folder / "far-000000.tar").write_bytes(far)
    copy.unlink()
    with pytest.raises(DataError, match=r"document 3 of far-000000\.tar .*changed"):
        everything(remote(served, cache))
    left_out = remote(served, cache, damaged=Damaged.skip)
    assert everything(left_out) == [*expected[:3], [], *expected[4:]]
    assert left_out.damaged_documents == {3}


def test_rows_from_all_over_a_source_larger_than_the_cache_are_warned_of(
    served: Served, cache: CacheConfig
) -> None:
    cache.bytes = 100_000
    for packing, warned in ((Packing.offline, True), (Packing.online, False)):
        told: list[str] = []
        loader_of(served.url, cache, packing=packing, message=told.append).close()
        assert any("do not fit data.cache.bytes=100000" in text for text in told) == warned


@pytest.mark.parametrize("name", ["far", "far-000000.idx", "far-000000.tar"])
@pytest.mark.parametrize("fault", [503, 429, 0])
def test_what_fails_for_a_moment_is_tried_again(
    folder: Path, served: Served, cache: CacheConfig, name: str, fault: int
) -> None:
    expected = everything(Source(name="near", path=folder))
    served.faults[name] = [fault, fault]
    told: list[str] = []
    assert everything(remote(served, cache, message=told.append)) == expected
    if fault or name != "far":
        assert any("try 2 of 5 failed" in text for text in told)
    assert all(served.url in text for text in told)


def test_what_keeps_failing_ends_the_run_whatever_is_skipped(
    served: Served, cache: CacheConfig
) -> None:
    served.faults["far-000002.idx"] = [503] * 50
    for policy in Damaged:
        with pytest.raises(Unreachable, match=r"far-000002\.idx: failed 5 times.* 503"):
            remote(served, cache, damaged=policy)
    served.faults = {}
    source = remote(served, cache, damaged=Damaged.skip)
    served.faults["far-000000.tar"] = [500] * 50
    with pytest.raises(Unreachable, match=r"far-000000\.tar: failed 5 times.* 500"):
        source.words(0)
    served.faults = {"far": [403]}
    with pytest.raises(Unreachable, match=r"403.*check the URL and the credentials"):
        remote(served, cache)


def test_folders_that_cannot_be_listed_or_are_not_there(served: Served, cache: CacheConfig) -> None:
    served.listing = False
    with pytest.raises(DataError, match="does not exist or cannot be listed"):
        remote(served, cache)
    with pytest.raises(DataError, match="does not exist or cannot be listed"):
        Source(name="x", path=Url("memory://nowhere/at/all"), cache=cache)
    fsspec.filesystem("memory").makedirs("/empty", exist_ok=True)
    with pytest.raises(DataError, match=r"holds no \.tar shard"):
        Source(name="x", path=Url("memory://empty"), cache=cache)


def test_an_object_that_is_gone_is_not_asked_for_again(
    cache: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Store(fsspec.AbstractFileSystem):
        """Says what is not there as s3fs does: with an error of its library as the cause."""

        protocol = "gone"

        def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
            asked.append(path)
            raise FileNotFoundError(path) from RuntimeError("NoSuchKey")

    fsspec.register_implementation("gone", Store, clobber=True)
    folder = RemoteFolder(Url("gone://bucket"), cache=ShardCache(cache))
    with pytest.raises(DataError, match=r"x-000000\.idx is not there any more; restore it"):
        folder.content("x-000000.idx")
    assert len(asked) == 1


def test_a_copy_is_open_before_others_may_remove_it(
    folder: Path, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = min(folder.glob("*.tar"))
    index = read_index(shard)
    replace = os.replace

    def replace_and_lose(source: Path, target: Path) -> None:
        replace(source, target)
        Path(target).unlink()  # another process makes room, at once

    def fetch(to: Path) -> None:
        shutil.copyfile(shard, to)

    monkeypatch.setattr(os, "replace", replace_and_lose)
    with ShardCache(cache).open(
        url="http://far/x.tar",
        digest=index.digest,
        size=index.tar_bytes,
        fetch=fetch,
    ) as file:
        file.seek(0)
        assert file.read() == shard.read_bytes()


def test_a_server_without_ranges_will_do(folder: Path, served: Served, cache: CacheConfig) -> None:
    served.ranges = False
    assert everything(remote(served, cache)) == everything(Source(name="near", path=folder))


def test_a_shard_larger_than_the_bound_is_refused(served: Served, cache: CacheConfig) -> None:
    cache.bytes = 10_000
    # The shard is as it should be, so that nothing is skipped.
    source = remote(served, cache, damaged=Damaged.skip)
    with pytest.raises(DataError, match=r"more than data\.cache\.bytes=10000; raise the bound"):
        source.words(0)


def test_what_a_killed_process_left_is_removed(served: Served, cache: CacheConfig) -> None:
    source = remote(served, cache)
    source.words(0)
    (copy,) = copies(cache)
    left = copy.with_name(f".{copy.name.replace('000000', '000009')}.{2**40}.tmp")
    left.write_bytes(b"half")
    mine = copy.with_name("precious.tar")
    mine.write_bytes(b"not a copy")
    cache.bytes = 2 * source.shards[0].tar_bytes
    everything(remote(served, cache))
    assert not left.exists()
    assert mine.read_bytes() == b"not a copy"


def test_a_cache_folder_that_cannot_be_written_is_named(
    served: Served, cache: CacheConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    cache.folder = str(tmp_path / "file" / "cache")
    with pytest.raises(DataError, match=r"name another folder with data\.cache\.folder"):
        remote(served, cache).words(0)


def test_missing_and_unknown_file_systems_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r'pip install "emu35\[s3\]"'):
        Source(name="x", path=place_of("s3://bucket/folder"))
    with pytest.raises(DataError, match=r"nonsense://x.*use a local path, or a URL"):
        Source(name="x", path=place_of("nonsense://x"))


def test_places() -> None:
    assert place_of("s3://bucket/a/b/") == Url("s3://bucket/a/b")
    assert place_of("file:///data/a") == Path("/data/a")
    assert place_of("data/a:b") == Path("data/a:b")
    assert str(place_of("s3://bucket/a") / "x.tar") == "s3://bucket/a/x.tar"
    assert name_of(place_of("gs://bucket/a/text")) == name_of(Path("/b/text")) == "text"


def test_commands_take_a_url(
    served: Served, cache: CacheConfig, capsys, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EMU35_CACHE", str(tmp_path / "home"))
    stats(StatsOptions(folders=[served.url], sequence_length=128))
    inspect(InspectOptions(folder=served.url, count=1))
    commands.index(commands.IndexOptions(folders=[served.url], verify=True))
    out = capsys.readouterr().out
    assert "far: 60 documents" in out
    assert "--- document 0  id 0" in out
    assert "shards, 60 documents" in out
    with pytest.raises(ConfigError, match="index the shards where they were written"):
        commands.index(commands.IndexOptions(folders=[served.url]))
