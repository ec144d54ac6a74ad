"""``emu35 data pack``: the same bytes every time, whole or not there, and clear refusals."""

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import fork
from packing import ROW, VOCABULARY, pack, varied, write_shards

from emu35.config.data import Overlong
from emu35.data.opening import open_source
from emu35.data.pack import PackedRows
from emu35.data.staging import whole_folder
from emu35.errors import ConfigError, DataError
from emu35.tokens.document import Image, Part, Text
from emu35.tokens.text import TextTokenizer

KILLED = 9
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill, unlike a power cut, loses nothing for want of a sync; without them this is quick."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def plain(tmp_path: Path, tokenizer: TextTokenizer) -> Path:
    write_shards(tmp_path / "plain", varied(20, seed=1), tokenizer=tokenizer)
    return tmp_path / "plain"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_inputs_and_seed_give_the_same_bytes(plain: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        pack(plain, out=folder, source="s", seed=seed, shard_bytes=9000)
    one, two, other = (contents(folder) for folder in folders)
    assert one == two
    assert one.keys() == other.keys()
    assert one["s-000000.tar"] != other["s-000000.tar"]


def test_rows_are_at_least_as_full_as_those_packed_in_memory(plain: Path, tmp_path: Path) -> None:
    summary = pack(plain, out=tmp_path / "packed")
    entry = open_source(name="plain", path=plain, vocabulary=VOCABULARY, limit=ROW)
    in_memory = PackedRows(lengths=entry.items.length, capacity=ROW, key="")
    assert summary.rows <= len(in_memory)


def kill_before(change: int, *, plain: Path, out: Path) -> bool:
    """Pack in a process that dies, as by SIGKILL, just before its ``change``-th change of the disk;
    whether it died."""
    child = fork()
    if child == 0:
        left = [change]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
            if writes or event in _CHANGES:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(KILLED)

        with contextlib.suppress(BaseException):
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            sys.addaudithook(hook)
            pack(plain, out=out, shard_bytes=20_000)
            os._exit(0)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_leaves_a_whole_folder_or_none_and_the_next_run_the_same_bytes(
    plain: Path, tmp_path: Path, every: int
) -> None:
    summary = pack(plain, out=tmp_path / "clean" / "packed", shard_bytes=20_000)
    assert summary.shards > 1
    clean = contents(tmp_path / "clean" / "packed")
    change, killed = 1 - every, True
    while killed:
        change += every
        place = tmp_path / f"kill{change}"
        killed = kill_before(change, plain=plain, out=place / "packed")
        if (place / "packed").exists():
            assert contents(place / "packed") == clean
        pack(plain, out=place / "packed", shard_bytes=20_000)
        assert contents(place / "packed") == clean
        # A finished run clears up; one that had nothing left to do leaves what lies beside.
        shutil.rmtree(place)
    assert change > 10


def test_a_failure_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    shard = max(plain.glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[1536] ^= 1  # the first token
    shard.write_bytes(data)
    with pytest.raises(DataError, match=f"{shard.name} is not a complete, unaltered token shard"):
        pack(plain, out=tmp_path / "packed", shard_bytes=9000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_one_process_at_a_time(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    with pytest.raises(DataError, match="another process is writing"), whole_folder(out):
        pack(plain, out=out)
    assert pack(plain, out=out).rows > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "plain"]


def test_a_second_call_has_nothing_to_do(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    first = pack(plain, out=out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = pack(plain, out=out)
    assert again.repeated
    assert (again.rows, again.fill) == (first.rows, first.fill)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before

    with pytest.raises(DataError, match=r"seed was 7 and is 8.*Name another folder"):
        pack(plain, out=out, seed=8)
    (out / "packed-000000.tar").unlink()
    with pytest.raises(DataError, match="restore the shard"):
        pack(plain, out=out)


def test_a_folder_with_other_content_is_left_alone(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"is not an empty folder \(there is notes\.txt\)"):
        pack(plain, out=out)
    assert contents(out) == {"notes.txt": b"mine"}
    (out / "notes.txt").unlink()
    assert pack(plain, out=out).rows > 1


def test_inputs_that_cannot_be_packed_are_named(plain: Path, tmp_path: Path) -> None:
    pack(plain, out=tmp_path / "packed")
    with pytest.raises(DataError, match="lies packed in rows of 96 tokens already"):
        pack(plain, tmp_path / "packed", out=tmp_path / "again")
    with pytest.raises(ConfigError, match="named twice"):
        pack(plain, tmp_path / "x" / ".." / "plain", out=tmp_path / "again")
    with pytest.raises(ConfigError, match="is one of the folders to pack"):
        pack(plain, out=plain)
    with pytest.raises(ConfigError, match=r"sequence_length=0 is too small"):
        pack(plain, out=tmp_path / "again", sequence_length=0)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "emu35"}, "different tokenizers: kind=bytes, .* and kind=emu35"),
        ({"codebook_size": 128}, "codebook_size=64 and .*codebook_size=128"),
        ({"vision": "b" * 64}, "different image tokenizers"),
    ],
)
def test_inputs_of_other_tokenizers_are_refused(
    tmp_path: Path, tokenizer: TextTokenizer, change: dict[str, Any], message: str
) -> None:
    documents = varied(9, seed=1)
    write_shards(tmp_path / "a", documents, tokenizer=tokenizer, vision="a" * 64)
    write_shards(tmp_path / "b", documents, tokenizer=tokenizer, **{"vision": "a" * 64, **change})
    with pytest.raises(DataError, match=message):
        pack(tmp_path / "a", tmp_path / "b", out=tmp_path / "packed")


def test_what_is_too_long_is_named_by_the_options_of_the_command(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    documents: list[list[Part]] = [[Text("a")], [Text("b" * 150)]]
    write_shards(tmp_path / "a", documents, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"longer than --sequence-length 96.*--overlong drop"):
        pack(tmp_path / "a", out=tmp_path / "packed", overlong=Overlong.refuse)
    summary = pack(tmp_path / "a", out=tmp_path / "packed", overlong=Overlong.drop)
    text = "\n".join(summary.lines())
    assert "1 documents, 3 tokens in 1 rows of 96" in text
    assert "1 of 2 documents are longer than --sequence-length 96" in text
    assert "data." not in text

    documents = [[Image(np.zeros((12, 12), np.int64))]]
    write_shards(tmp_path / "b", documents, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"picture longer than --sequence-length 96.*Raise --seq"):
        pack(tmp_path / "b", out=tmp_path / "other")


def test_all_inputs_are_packed_together(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    # 46 + 2 tokens: rows hold two, and of an odd number one would stand alone.
    for name in ("a", "b"):
        write_shards(tmp_path / name, [[Text("x" * 46)]] * 3, tokenizer=tokenizer)
    apart = [pack(tmp_path / name, out=tmp_path / f"{name}2").rows for name in ("a", "b")]
    together = pack(tmp_path / "a", tmp_path / "b", out=tmp_path / "both")
    assert apart == [2, 2]
    assert together.rows == 3
    assert together.fill == 1.0


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'{"id": "s/2"', b'\0"id": "s/2"'), (b'"s/2"', b'"s/9"'), (b'"images"', b'"imagez"')],
)
def test_an_altered_record_is_not_packed(
    tmp_path: Path, tokenizer: TextTokenizer, old: bytes, new: bytes
) -> None:
    write_shards(tmp_path / "s", [[Text(f"hello {n}")] for n in range(5)], tokenizer=tokenizer)
    (shard,) = (path for path in (tmp_path / "s").glob("*.tar") if b'"s/2"' in path.read_bytes())
    data = shard.read_bytes()
    assert old in data
    shard.write_bytes(data.replace(old, new, 1))
    with pytest.raises(DataError, match=f"{shard.name} is not a complete, unaltered token shard"):
        pack(tmp_path / "s", out=tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
