"""``emu35 data pack`` as it is called, and the other commands on what it wrote."""

from pathlib import Path

import pytest

from emu35.cli import main


def test_packed_shards_can_be_checked_measured_and_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number:02d}.txt").write_text(f"text {number} " + "x" * 20)
    (texts / "long.txt").write_text(" ".join(str(number) for number in range(60)))
    plain, packed = str(tmp_path / "plain"), str(tmp_path / "packed")
    assert main(["data", "ingest", str(texts), "--out", plain]) == 0
    capsys.readouterr()

    command = ["data", "pack", plain, "--out", packed, "--sequence-length", "64"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "13 documents, " in printed
    assert "rows of 64, " in printed
    assert "cut: 1 documents longer than a row, 15 pieces in all" in printed
    rows = int(printed.split(" rows of 64")[0].split()[-1])
    assert main(command) == 0
    assert "packed before from the same" in capsys.readouterr().out

    assert main(["data", "index", packed, "--verify"]) == 0
    assert f"verified 1 shards, {rows} rows of 15 pieces" in capsys.readouterr().out
    assert main(["data", "validate", packed]) == 0
    assert "all sound" in capsys.readouterr().out
    # The rows are as long as they are, whatever length is asked about.
    assert main(["data", "stats", packed]) == 0
    printed = capsys.readouterr().out
    assert "packed: 15 documents" in printed
    assert "of rows of 64" in printed
    assert main(["data", "inspect", packed, "--count", "100"]) == 0
    printed = capsys.readouterr().out
    assert "id row-00000000" in printed
    assert all(f"text {number} " in printed for number in range(12))
    assert main([*command, "--seed", "5"]) != 0
    assert "seed was 1234 and is 5" in capsys.readouterr().err
