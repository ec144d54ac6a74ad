"""Damaged shards are all named: before a run that refuses them, and at the start of one that goes
on without them. Nothing else is lost, and nothing crashes."""

import hashlib
import io
import json
import random
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_damage import HEADERS, KINDS, Damage, flip, with_header
from shard_documents import CODEBOOK, WriteSource, random_documents

from emu35.config.data import Damaged, Packing, SourceConfig, TokenDataConfig
from emu35.data.batch import Batch
from emu35.data.index import build_index, index_path, read_index, verify_index
from emu35.data.loader import TokenLoader
from emu35.data.shards import (
    BLOCK,
    DIGEST_MEMBER,
    META_MEMBER,
    ShardMeta,
    member_header,
)
from emu35.data.source import Source
from emu35.errors import DataError
from emu35.tokens.document import Document, Text
from emu35.tokens.serialize import serialize
from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary

ROW = 96
VOCABULARY = Vocabulary(n_text=256, codebook_size=CODEBOOK)


def loader_of(folder: Path, *, told: list[str] | None = None, **changes: Any) -> TokenLoader:
    settings: dict[str, Any] = {
        "sequence_length": ROW,
        "open_bins": 1,
        "shuffle_window": 8,
        "damaged": Damaged.skip,
        "sources": {"a": SourceConfig(path=str(folder))},
    }
    return TokenLoader(
        data=TokenDataConfig(**{**settings, **changes}),
        vocabulary=VOCABULARY,
        seed=7,
        global_batch_size=4,
        micro_batch_size=2,
        dp_rank=0,
        dp_size=1,
        message=[].append if told is None else told.append,
    )


def first_epoch(loader: TokenLoader, *, tokens: int) -> list[tuple[int, ...]]:
    """Documents that come out until there were ``tokens`` of them; one bin holds nothing back."""
    found: list[tuple[int, ...]] = []
    while sum(map(len, found)) < tokens:
        for batch in loader.next_step():
            for ids, starts in zip(
                batch.tokens.tolist(), batch.document_start.tolist(), strict=True
            ):
                for start in sorted({start for start in starts if start < ROW}):
                    found.append(tuple(ids[start : start + starts.count(start)]))
    return found


def drain(loader: TokenLoader, *, steps: int) -> list[Batch]:
    return [batch for _ in range(steps) for batch in loader.next_step()]


@pytest.mark.parametrize("damage", KINDS, ids=lambda damage: damage.__name__)
def test_every_kind_of_damage_is_an_error_that_names_the_shard(
    write_source: WriteSource, damage: Damage
) -> None:
    folder = write_source("a", random_documents(20, seed=2), shard_bytes=12_000)
    shard = folder / "a-000001.tar"
    assert (folder / "a-000002.tar").exists()
    for seed in range(4):
        whole = folder.with_name("whole")
        shutil.copytree(folder, whole)
        damage(shard, random.Random(seed))
        with pytest.raises(DataError, match=r"a-000001") as caught:
            Source(name="a", path=folder)
        assert len(str(caught.value)) < 1000
        with pytest.raises(DataError, match=r"a-000001"):
            verify_index(shard)
        source = Source(name="a", path=folder, damaged=Damaged.skip)
        assert [found.name for found in source.damaged] == ["a-000001.tar"]
        shutil.rmtree(folder)
        whole.rename(folder)


@pytest.mark.parametrize("number", range(len(HEADERS)))
def test_absurd_headers_of_an_index_are_errors(write_source: WriteSource, number: int) -> None:
    shard = write_source("a", random_documents(3, seed=2)) / "a-000000.tar"
    with_header(shard, HEADERS[number])
    with pytest.raises(DataError, match=r"index .*a-000000\.idx makes no sense .*emu35 data index"):
        read_index(shard)


def test_a_hundred_damaged_shards_among_healthy_ones(
    write_source: WriteSource, tokenizer: TextTokenizer
) -> None:
    documents = random_documents(520, seed=11, longest=30)
    folder = write_source("a", documents, shard_bytes=10_000)
    shards = sorted(path.name for path in folder.glob("*.tar"))
    assert len(shards) > 130
    whole = Source(name="a", path=folder)
    every = [tuple(words.tolist()) for words, _ in whole.read(np.arange(len(whole)))]
    assert every == [tuple(serialize(Document(p), tokenizer).tokens.tolist()) for p in documents]
    rng = random.Random(5)
    harmed = rng.sample(shards, 100)
    for number, name in enumerate(harmed):
        KINDS[number % len(KINDS)](folder / name, rng)

    with pytest.raises(DataError, match=rf"100 of {len(shards)} shards cannot be used") as caught:
        loader_of(folder, damaged=Damaged.refuse)
    assert all(name in str(caught.value) for name in harmed)
    assert "data.damaged=skip" in str(caught.value)

    told: list[str] = []
    healthy = np.isin(whole.shard, [shards.index(name) for name in harmed], invert=True)
    expected = [every[document] for document in np.flatnonzero(healthy)]
    with loader_of(folder, told=told) as loader:
        (source,) = loader.sources
        kept = [shard.path.name for shard in source.shards]
        named = [shard.name for shard in source.damaged]
        assert sorted(kept + named) == shards
        assert sorted(named) == sorted(harmed)
        found = first_epoch(loader, tokens=sum(map(len, expected)))
        assert loader.damaged_documents == 0
    (text,) = told
    assert f"100 of {len(shards)} shards are left out (data.damaged=skip)" in text
    assert text.count("\n") == 100
    assert all(f"  - {name}: " in text for name in harmed)
    assert sorted(found[: len(expected)]) == sorted(expected)


@pytest.mark.parametrize("packing", list(Packing))
def test_altered_documents_are_padding_and_named_once(
    write_source: WriteSource, tokenizer: TextTokenizer, packing: Packing
) -> None:
    documents = random_documents(40, seed=4, longest=30)
    folder = write_source("a", documents, shard_bytes=30_000)
    whole = Source(name="a", path=folder)
    altered = [3, 17, 39]
    for document in altered:
        index, row = whole.locate(document)
        part = index.token_word if document != 17 else index.run_word
        flip(folder / index.path.name, offset=4 * int(part[row]), bit=1)
    told: list[str] = []
    healthy = [n for n in range(40) if n not in altered]
    expected = {
        tuple(serialize(Document(documents[n]), tokenizer).tokens.tolist()) for n in healthy
    }
    with loader_of(folder, told=told, packing=packing) as loader:
        planned = loader.state_dict()["sources"]["a"]["items"]
        assert planned == 40
        found: list[tuple[int, ...]] = []
        for _ in range(30):
            for batch in loader.next_step():
                padding = batch.document_start == ROW
                assert (batch.tokens[padding] == VOCABULARY.pad).all()
                assert not batch.label_valid[padding].any()
                assert (batch.positions[padding] == 0).all()
                for ids, starts in zip(
                    batch.tokens.tolist(), batch.document_start.tolist(), strict=True
                ):
                    for start in sorted({start for start in starts if start < ROW}):
                        found.append(tuple(ids[start : start + starts.count(start)]))
        assert loader.damaged_documents == 3
    assert set(found) == expected
    words = [text for text in told if "changed after it was indexed" in text]
    assert len(words) == 3  # though three epochs and more have passed
    for document in altered:
        index, row = whole.locate(document)
        assert any(f"document {row} of {index.path.name} " in text for text in words)
    with (
        loader_of(folder, packing=packing, damaged=Damaged.refuse) as loader,
        pytest.raises(DataError, match=r"changed after it was indexed.*data\.damaged=skip"),
    ):
        drain(loader, steps=30)


def test_other_rows_are_as_they_would_be(write_source: WriteSource) -> None:
    folder = write_source("a", [[Text(f"{n:03d} " + "x" * 20)] for n in range(24)])
    with loader_of(folder) as loader:
        before = drain(loader, steps=2)
        state = loader.state_dict()
    flip(folder / "a-000000.tar", offset=4 * int(read_index(folder / "a-000000.tar").token_word[9]))
    with loader_of(folder) as loader:
        after = drain(loader, steps=2)
        assert loader.state_dict() == state
    differ = 0
    for one, two in zip(before, after, strict=True):
        same = one.tokens == two.tokens
        assert (two.tokens[~same] == VOCABULARY.pad).all()
        assert torch.equal(one.positions[same], two.positions[same])
        differ += int((~same).any(dim=1).sum())
    assert differ >= 1


def flip_pair(shard: Path, *, tokens: int, runs: int) -> None:
    """The same bit of two words eight bytes apart: an exclusive-or stays as it was."""
    other = next(byte for byte in range(tokens & ~7, runs, 8) if byte % 8 == runs % 8)
    for offset in (runs, other):
        flip(shard, offset=offset, bit=5)


def swap_sectors(shard: Path, *, tokens: int, runs: int) -> None:
    """Two of 512 bytes among the tokens, which a sum or an exclusive-or does not notice."""
    del runs
    data = bytearray(shard.read_bytes())
    one, two = (slice(tokens + 512 * n, tokens + 512 * (n + 1)) for n in range(2))
    data[one], data[two] = data[two], data[one]
    shard.write_bytes(data)


@pytest.mark.parametrize("damage", [flip_pair, swap_sectors])
def test_damage_that_cancels_in_a_sum_is_found(
    write_source: WriteSource, damage: Callable[..., None]
) -> None:
    letters = random.Random(3)
    documents = [[Text("".join(letters.choices("abcdefgh", k=600)))] for _ in range(8)]
    folder = write_source("a", documents)
    shard = folder / "a-000000.tar"
    index = read_index(shard)
    damage(shard, tokens=4 * int(index.token_word[2]), runs=4 * int(index.run_word[2]))
    with pytest.raises(DataError, match=r"document 2 of a-000000\.tar .*changed"):
        Source(name="a", path=folder).words(2)
    with loader_of(folder) as loader:
        for _ in range(3):
            loader.next_step()
        assert loader.damaged_documents == 1


def test_a_shard_that_goes_away_during_the_run(write_source: WriteSource) -> None:
    folder = write_source("a", random_documents(60, seed=4, longest=30), shard_bytes=20_000)
    told: list[str] = []
    with loader_of(folder, told=told) as loader:
        (folder / "a-000001.tar").unlink()
        (folder / "a-000002.tar").write_bytes(b"")
        shutil.copyfile(folder / "a-000000.tar", folder / "a-000003.tar")
        for _ in range(20):
            loader.next_step()
        (source,) = loader.sources
        gone = {shard for shard, n in enumerate(source.documents_per_shard) if shard in (1, 2)}
        of_gone = {n for n in range(len(source)) if int(source.shard[n]) in gone}
        assert of_gone <= source.damaged_documents
        assert len(source.damaged_documents) == loader.damaged_documents
    for name in ("a-000001.tar", "a-000002.tar"):
        assert sum(name in text and "from now on" in text for text in told) == 1
    other = write_source("b", random_documents(9, seed=4, longest=30)) / "b-000000.tar"
    with loader_of(other.parent, damaged=Damaged.refuse) as loader:
        other.unlink()
        with pytest.raises(DataError, match=rf"{re.escape(str(other))}: No such file"):
            loader.next_step()


def test_a_shard_damaged_between_two_runs_is_named_on_resume(write_source: WriteSource) -> None:
    folder = write_source("a", random_documents(60, seed=4, longest=30), shard_bytes=20_000)
    index_path(folder / "a-000000.tar").write_bytes(b"")
    with loader_of(folder) as loader:
        loader.next_step()
        state = json.loads(json.dumps(loader.state_dict()))
        expected = loader.next_step()
    with loader_of(folder) as loader:
        loader.load_state_dict(state)
        assert torch.equal(loader.next_step()[0].tokens, expected[0].tokens)
    flip(folder / "a-000002.tar", offset=(folder / "a-000002.tar").stat().st_size - 1500)
    build_index(folder / "a-000000.tar")
    message = (
        r"shards of source 'a' changed .*damaged since and left out: a-000002\.tar; left out then "
        r"and not now: a-000000\.tar"
    )
    with loader_of(folder) as loader, pytest.raises(DataError, match=message):
        loader.load_state_dict(state)


def test_states_from_before_there_was_a_choice_go_on(write_source: WriteSource) -> None:
    with loader_of(write_source("a", random_documents(20, seed=4, longest=30))) as loader:
        loader.next_step()
        state = loader.state_dict()
        del state["sources"]["a"]["left_out"]
        loader.load_state_dict(state)


def test_nothing_left_is_refused(write_source: WriteSource) -> None:
    folder = write_source("a", random_documents(6, seed=4), shard_bytes=9_000)
    for shard in folder.glob("*.tar"):
        index_path(shard).unlink()
    with pytest.raises(DataError, match=r"data\.damaged=skip leaves nothing"):
        loader_of(folder)


def shard_with(members: list[tuple[tarfile.TarInfo | str, bytes]]) -> bytes:
    """A tar of any members whose closing digest is right."""
    body = io.BytesIO()
    for member, data in members:
        header = (
            member_header(member, len(data))
            if isinstance(member, str)
            else member.tobuf(tarfile.GNU_FORMAT)
        )
        body.write(header + data + bytes(-len(data) % BLOCK))
    digest = hashlib.sha256(body.getvalue()).hexdigest().encode()
    end = digest + bytes(BLOCK - len(digest)) + bytes(2 * BLOCK)
    return body.getvalue() + member_header(DIGEST_MEMBER, 64) + end


def huge(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


META = ShardMeta(source="a", kind="bytes", n_text=256, codebook_size=CODEBOOK).to_json().encode()
GOOD = (META_MEMBER, META)
WORDS = np.arange(4, dtype="<u4").tobytes()


@pytest.mark.parametrize(
    "members",
    [
        [],
        [(META_MEMBER, b"\xff\xff")],
        [(META_MEMBER, b"[" * 100_000)],
        [(META_MEMBER, b'{"format": 1, "source": 7}')],
        [(META_MEMBER, b'{"format": 9}')],
        [GOOD, (huge("x.tok", 2**60), b"")],
        [GOOD, (huge("x.tok", 2**33), WORDS)],
        [GOOD, ("x.tok", WORDS)],
        [GOOD, ("x.tok", b""), ("x.mod", WORDS), ("x.json", b"{}")],
        [GOOD, ("x.tok", WORDS), ("x.mod", WORDS), ("x.json", b"{}")],
        [GOOD, ("x.tok", WORDS), ("x.mod", WORDS), ("x.json", b"\xfe")],
        [GOOD, ("x.tok", WORDS), ("x.mod", WORDS), ("x.json", b'{"images": [7]}')],
        [GOOD, ("x.tok", WORDS), ("x.mod", WORDS), ("x.json", b'{"images": [["a", "b"]]}')],
        [GOOD, ("x.tok", WORDS), ("x.mod", WORDS), ("x.json", b'{"images": [[1, 1e999]]}')],
        [GOOD, ("x.tok", WORDS), ("x.mod", b"\x4f\0\0\0"), ("x.json", b'{"images": []}')],
        [GOOD, ("x.mod", WORDS), ("x.tok", WORDS), ("x.json", b'{"images": []}')],
        [GOOD, ("x.tok", WORDS), ("x.mod", WORDS), ("x.json", b'{"images": [[3, 99]]}')],
    ],
)
def test_nonsense_with_a_right_digest_is_an_error(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo | str, bytes]]
) -> None:
    shard = tmp_path / "a-000000.tar"
    shard.write_bytes(shard_with(members))
    with pytest.raises(DataError, match=r"a-000000\.tar (is|holds) no"):
        build_index(shard)
    assert not index_path(shard).exists()
