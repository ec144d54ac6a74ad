"""The words after ``emu35 data inspect``: of a folder or of a run, never of both."""

from pathlib import Path

import pytest

from emu35.cli import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a folder of shards to look at, or a run folder with --run"),
        (["x", "--run", "y", "--step", "1"], "or a run folder with --run"),
        (["x", "--step", "1", "--token", "2"], "--step, --token: for a --run only"),
        (
            ["--run", "y", "--step", "1", "--count", "2", "--images", "z"],
            "--count, --images: for a folder of shards only",
        ),
        (["--run", "y"], "--run needs --step"),
    ],
)
def test_what_belongs_elsewhere_is_refused_by_name(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "inspect", *words]) == 2
    assert message in capsys.readouterr().err
