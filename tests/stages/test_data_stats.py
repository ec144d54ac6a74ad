"""``emu35 data stats``: tables, bars, JSON and a page, of one folder and of several."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from looked_at import Page, scenes, write_shards

from emu35.cli import main
from emu35.tokens.document import Image, Text


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    words = [[Text("x" * length)] for length in (2, 6, 6, 61, 62, 200)]
    pictures = [[Image(np.zeros((2, 3), int))]] * 5 + [[Image(np.zeros((4, 1), int))]]
    return [
        str(write_shards(tmp_path / "words", words)),
        str(write_shards(tmp_path / "pictures", pictures, shard_bytes=5000)),
    ]


def test_one_folder(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", folders[0], "--sequence-length", "1024"]) == 0
    printed = capsys.readouterr().out
    assert "words: 6 documents, 349 tokens, 1 shards, 0 pictures" in printed
    assert "grids" not in printed
    bars = re.findall(r"(\d+\.\.\d+) +(\d+) +(\S+%) *(#*)$", printed, re.MULTILINE)
    assert [(low, int(count)) for low, count, _, _ in bars] == [
        ("4..7", 1),
        ("8..15", 2),
        ("16..31", 0),
        ("32..63", 1),
        ("64..127", 1),
        ("128..255", 1),
    ]
    lengths = [len(bar) for *_, bar in bars]
    assert lengths[1] == max(lengths) == 2 * lengths[0] == 2 * lengths[3]
    assert lengths[2] == 0
    assert bars[-1][2] == f"{202 / 349:.1%}"


def test_several_folders_are_compared(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "stats", *folders, "--sequence-length", "1024"]) == 0
    printed = capsys.readouterr().out
    assert "grids    2x3 5 (83.3%)  4x1 1 (16.7%)" in printed
    head, words, pictures, whole = [line.split() for line in printed.splitlines()[-4:]]
    assert head[:6] == ["source", "shards", "documents", "pictures", "tokens", "share"]
    total = int(whole[4])
    assert [line[0] for line in (words, pictures, whole)] == ["words", "pictures", "all"]
    assert int(words[4]) + int(pictures[4]) == total
    assert words[5] == f"{int(words[4]) / total:.1%}"
    assert whole[5] == "100.0%"
    assert (words[2:4], pictures[2:4], whole[2:4]) == (["6", "0"], ["6", "6"], ["12", "6"])


def test_folders_of_one_name_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [str(write_shards(tmp_path / name / "train", scenes(3))) for name in ("a", "b")]
    assert main(["data", "stats", *both]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == [*both, "all"]


def test_json_has_every_number(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", *folders, "--sequence-length", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    words, pictures = found["sources"]
    assert found["sequence_length"] == 16
    assert words["length_histogram"][0] == [4, 8, 1, 4]
    assert words["fill"] > 0.9
    assert pictures["grids"] == [[2, 3, 5], [4, 1, 1]]
    assert pictures["modality"]["visual"] == 5 * 6 + 4
    assert sum(pictures["modality"].values()) == pictures["tokens"]
    assert found["together"]["documents"] == 12


def test_a_source_that_cannot_be_packed_is_still_counted(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "stats", folders[1], "--sequence-length", "8"]) == 0
    printed = capsys.readouterr().out
    assert "pictures: 6 documents" in printed
    assert "packing  not into rows of 8: source 'pictures'" in printed


def test_the_page_shows_tables_and_bars(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "stats.html"
    assert main(["data", "stats", *folders, "--html", str(page)]) == 0
    assert f"written: {page}" in capsys.readouterr().out
    shown = Page(page)
    assert "12 documents, 6 pictures" in shown.text
    assert "2 x 3" in shown.text
    assert shown.tags.count("svg") == 3
    # Bars of words (6 bins), of pictures, and of both.
    assert shown.tags.count("rect") >= 6 + 1 + 6
    assert "8 to 15 tokens: 2 documents" in shown.text


def test_a_page_that_cannot_be_written_and_a_bad_length_are_messages(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "stats", folders[0], "--html", str(tmp_path / "no" / "x.html")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert main(["data", "stats", folders[0], "--sequence-length", "0"]) == 2
    assert "--sequence-length 0 must be at least 1" in capsys.readouterr().err
