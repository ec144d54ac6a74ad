"""``emu35 data validate``: summaries, problems, the report, and the exit code."""

import json
from pathlib import Path

import numpy as np
import pytest
from looked_at import scenes, write_shards

from emu35.cli import main
from emu35.data.index import read_index
from emu35.data.shards import ShardMeta
from emu35.data.writer import ShardWriter
from emu35.tokens.serialize import TokenSequence, modality_of
from emu35.tokens.vocabulary import Vocabulary


def damage(folder: Path, *, documents: int) -> str:
    """Change a token in each of the first documents of the first shard; returns its name."""
    shard = min(folder.glob("*.tar"))
    index = read_index(shard)
    content = bytearray(shard.read_bytes())
    for word in index.token_word[:documents].tolist():
        content[4 * word] ^= 1
    shard.write_bytes(content)
    return shard.name


def test_sound_folders_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_shards(tmp_path / name, scenes(5), shard_bytes=5000) for name in "ab"]
    report = tmp_path / "report.jsonl"
    assert main(["data", "validate", *map(str, folders), "--report", str(report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("5 documents, 5 pictures" in line and "all sound" in line for line in lines)
    assert report.read_text() == ""


def test_every_problem_is_reported_and_twenty_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = write_shards(tmp_path / "sound", scenes(5))
    folder = write_shards(tmp_path / "bad", scenes(60), shard_bytes=100_000)
    name = damage(folder, documents=30)
    report = tmp_path / "report.jsonl"
    words = ["data", "validate", str(folder), str(tmp_path / "none"), str(sound)]
    assert main([*words, "--report", str(report)]) == 2
    captured = capsys.readouterr()
    problems = [json.loads(line) for line in report.read_text().splitlines()]
    damaged = [problem for problem in problems if problem["check"] == "checksum"]
    assert [problem["document"] for problem in damaged] == list(range(30))
    assert damaged[3]["shard"] == name
    assert damaged[3]["id"] == "bad-3"
    assert damaged[3]["key"] == "000000-000003"
    assert sum(line.startswith("  - ") for line in captured.out.splitlines()) == 20
    assert f"... and {len(problems) - 20} more" in captured.out
    assert f"{sound}: 1 shards, 5 documents" in captured.out
    assert f"{tmp_path / 'none'}: 0 shards" in captured.out
    assert "nothing could be read" in captured.out
    assert f"{len(problems)} problems, in 1 of " in captured.err
    assert f"all of them are in {report}" in captured.err

    assert main(words) == 2
    assert "name a file with --report" in capsys.readouterr().err


def test_ids_that_occur_twice_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_shards(tmp_path / "a" / "s", scenes(3))
    other = write_shards(tmp_path / "b" / "s", scenes(2))
    for path in other.iterdir():
        (folder / f"z-000000{path.suffix}").write_bytes(path.read_bytes())
    assert main(["data", "validate", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "all sound" in printed
    assert (
        "warning: 2 documents have the id of another; the first: document 0 of z-000000.tar "
        "that of document 0 of s-000000.tar"
    ) in printed


def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_shards(tmp_path / "s", scenes(1)))
    assert main(["data", "validate", folder, "--threads", "0"]) == 2
    assert "--threads 0 must be at least 1" in capsys.readouterr().err
    assert main(["data", "validate", folder, "--report", str(tmp_path / "no" / "r.jsonl")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


def test_without_the_text_table_everything_else_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = Vocabulary(n_text=151_643, codebook_size=64)
    meta = ShardMeta(source="s", kind="emu35", n_text=151_643, codebook_size=64)
    tokens = np.array([vocabulary.bos, 7, vocabulary.eos], np.uint32)
    sequence = TokenSequence(tokens, modality_of(tokens, vocabulary=vocabulary))
    with ShardWriter(folder=tmp_path / "s", meta=meta) as writer:
        for number in range(2):
            writer.append(sequence, document_id=str(number))
    words = ["data", "validate", str(tmp_path / "s"), "--table", str(tmp_path / "none")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "all sound" in printed
    assert "not checked: how sizes of pictures are spelled, for " in printed
    damage(tmp_path / "s", documents=1)
    assert main(words) == 2
    assert "document 0 (000000-000000, id 0): its bytes changed" in capsys.readouterr().out
