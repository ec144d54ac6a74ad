"""The files that training an image tokenizer leaves for people: whole, readable, or refused."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from emu35.errors import DataError
from emu35.stages.ibq.files import write_grid, write_rejects


def names_in(path: Path) -> list[str]:
    """As any reader of JSON lines takes it: bytes, cut at line feeds."""
    return [json.loads(line)["picture"] for line in path.read_bytes().splitlines()]


def test_rejects_of_ranks_and_of_earlier_attempts_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    write_rejects(path, reasons=[{}, {}])
    assert not path.exists()
    write_rejects(path, reasons=[{"b.png": "damaged image"}, {"a.png": "truncated image"}])
    write_rejects(path, reasons=[{"c.png": "not an image"}])
    assert names_in(path) == ["a.png", "b.png", "c.png"]


def test_any_file_name_can_be_named_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    names = sorted([os.fsdecode(b"\xff\xfe.png"), "a\u2028b.png", "caf\u00e9.png", "c\nd.png"])
    write_rejects(path, reasons=[dict.fromkeys(names, "line one\u2029line two")])
    write_rejects(path, reasons=[{}])
    assert names_in(path) == names
    assert os.fsencode(names_in(path)[-1]) == b"\xff\xfe.png"


def test_a_file_of_other_writers_is_read_with_its_separators(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    path.write_text('{"picture": "a\u2028b.png", "reason": "x"}\n', encoding="utf-8")
    write_rejects(path, reasons=[{"c.png": "y"}])
    assert names_in(path) == ["a\u2028b.png", "c.png"]


@pytest.mark.parametrize("name", ["rejects.jsonl", "reconstructions.png"])
def test_a_full_disk_is_named_and_the_earlier_file_stays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name

    def write(marker: float) -> None:
        if name.endswith(".png"):
            write_grid(torch.full((1, 2, 3, 4, 4), marker), path=path)
        else:
            write_rejects(path, reasons=[{f"{marker}.png": "damaged"}])

    write(0.0)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=rf"cannot write .*{name}: No space left.*free some space"):
        write(1.0)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
