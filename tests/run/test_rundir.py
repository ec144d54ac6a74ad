"""The run folder: created, resumed, refused, and owned by one process."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emu35.cli import main
from emu35.config import RunConfig
from emu35.config.io import read_config
from emu35.errors import ConfigError, LaunchError
from emu35.run import rundir
from emu35.run.compose import compose
from emu35.run.rundir import open_run


def test_a_new_folder_gets_the_configuration(tmp_path: Path):
    config = compose([f"run_dir={tmp_path}/a/b"])
    with open_run(config) as run:
        assert not run.resumed
        assert run.path == tmp_path / "a/b"
    assert read_config(tmp_path / "a/b") == config


def begin(config: RunConfig, *, folder: Path) -> None:
    """A run that made at least one step."""
    with open_run(config):
        (folder / "metrics.jsonl").write_text("")


def test_the_same_configuration_resumes(tmp_path: Path):
    config = compose([f"run_dir={tmp_path}"])
    begin(config, folder=tmp_path)
    with open_run(config):
        written = (tmp_path / "config.yaml").stat().st_mtime_ns
    with open_run(config) as run:
        assert run.resumed
        assert run.changes == []
    assert (tmp_path / "config.yaml").stat().st_mtime_ns == written


def test_what_may_change_is_changed_and_told(tmp_path: Path):
    begin(compose([f"run_dir={tmp_path}"]), folder=tmp_path)
    with open_run(compose([f"run_dir={tmp_path}", "log.every=3"])) as run:
        assert run.changes == ["log.every: 10 -> 3"]
    assert read_config(tmp_path).log.every == 3


def test_values_of_the_environment_are_not_told(tmp_path: Path, capsys):
    words = [f"run_dir={tmp_path}", "launch.env={HOST_ID: hidden}"]
    begin(compose(words[:1]), folder=tmp_path)
    with open_run(compose(words)) as run:
        assert run.changes == ["launch.env.HOST_ID: (value not shown)"]
    assert main(["show", "--diff", *words]) == 0
    assert "hidden" not in capsys.readouterr().out


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path):
    first = compose([f"run_dir={tmp_path}"])
    begin(first, folder=tmp_path)
    other = compose([f"run_dir={tmp_path}", "stage.steps=7", "seed=1", "log.every=3"])
    with pytest.raises(ConfigError) as caught, open_run(other):
        pass
    message = str(caught.value)
    assert "stage.steps: 100 -> 7" in message
    assert "seed: 1234 -> 1" in message
    assert "log.every" not in message
    assert read_config(tmp_path) == first


def test_a_folder_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rundir, "_LOCK_PATIENCE_SECONDS", 0.2)
    config = compose([f"run_dir={tmp_path}"])
    with open_run(config):
        script = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        lock = str(tmp_path / ".lock")
        other = subprocess.run([sys.executable, "-c", script, lock], capture_output=True)
        assert b"BlockingIOError" in other.stderr
        with pytest.raises(LaunchError, match=r"is in use by another emu35 process \(pid \d+\)"):
            open_run(config).__enter__()
    with open_run(config) as run:
        assert run.path == tmp_path


def test_a_run_that_failed_before_its_first_step_can_be_mended(tmp_path: Path):
    with open_run(compose([f"run_dir={tmp_path}", "seed=1"])):
        pass
    mended = compose([f"run_dir={tmp_path}", "seed=2"])
    with open_run(mended) as run:
        assert not run.resumed
    assert read_config(tmp_path) == mended


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        open_run(compose([f"run_dir={tmp_path}/file/run"])).__enter__()


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(ConfigError, match="cannot be written: No space left on device; free space"),
        open_run(compose([f"run_dir={tmp_path}"])),
    ):
        pass
