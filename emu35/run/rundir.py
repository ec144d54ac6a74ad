"""The run folder: whose it is, what configuration it holds, and that one process owns it.

``config.yaml`` is written once, before any rank starts, and replaced only when a resumed run
changes something it may change (:data:`emu35.config.io.MAY_CHANGE`). The lock is a ``flock`` on
``.lock``; local ranks inherit it, so a folder stays taken while a single rank of a killed launcher
is still alive.
"""

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from emu35.config.io import CONFIG_FILE, config_diff, may_change, read_config, write_config
from emu35.config.root import RunConfig
from emu35.errors import ConfigError, LaunchError

LOCK_FILE = ".lock"
LOGS = "logs"
"""Folder of the ranks' logs inside a run folder."""
_TRACES = ("checkpoints", "metrics.jsonl", "vision_tokenizer", "rows", "results.json")
_LOCK_PATIENCE_SECONDS = 5.0
_CLOCK_SECONDS = 10.0
"""How much the start of one process may seem to move, for it is counted from the host's clock."""
_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?")
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@dataclass(kw_only=True, slots=True, frozen=True)
class OpenRun:
    """A run folder that this process owns. ``lock`` is the descriptor to hand to child ranks;
    ``changes`` are the allowed differences from the configuration that was there before."""

    path: Path
    resumed: bool
    changes: list[str]
    lock: int


@contextmanager
def open_run(config: RunConfig) -> Generator[OpenRun]:
    """Take the folder ``config.run_dir`` for this run, creating it or resuming what it holds.

    Raises:
        ConfigError: the folder belongs to a run with another configuration (differences listed),
            or cannot be written. Values of ``launch.env`` are left out of that list.
        LaunchError: another process is running in it.
    """
    path = Path(config.run_dir).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None
    with locked(path) as lock:
        resumed = (path / CONFIG_FILE).exists() and _has_begun(path)
        changes = _accept(config, path=path) if resumed else []
        if not resumed or changes:
            try:
                write_config(config, path)
            except OSError as error:
                raise _unwritable(path, error) from None
        yield OpenRun(path=path, resumed=resumed, changes=changes, lock=lock)


@contextmanager
def locked(path: Path, *, owner: int | None = None) -> Generator[int]:
    """Hold the lock of the run folder ``path``; yields its file descriptor.

    ``owner`` is the process that answers for the run (default: this one), named to whoever finds
    the folder taken. Waits a few seconds, for the ranks of a run that was just killed need a moment
    to end.

    Raises:
        LaunchError: the folder is in use.
        ConfigError: the folder cannot be written.
    """
    file = path / LOCK_FILE
    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        _take(lock, path=path, owner=os.getpid() if owner is None else owner)
        yield lock
    finally:
        os.close(lock)


def _take(lock: int, *, path: Path, owner: int) -> None:
    deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{path} is in use by another emu35 process ({_read_owner(lock)}); wait for "
                    "it, stop it, or give this run another run_dir"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno in _NO_LOCKS_HERE:  # some network filesystems; nothing to hold then
                return
            raise _unwritable(path, error) from None
    try:
        os.ftruncate(lock, 0)
        text = f"{owner}\n{socket.gethostname()}\n{_started(owner)}\n"
        os.pwrite(lock, text.encode("ascii", "replace"), 0)
    except OSError as error:
        raise _unwritable(path, error) from None


@dataclass(kw_only=True, slots=True, frozen=True)
class LockOwner:
    """Who holds a run folder: the process ``pid`` (0: it did not say) on ``host``, which began at
    ``started`` (seconds since 1970; 0: unknown)."""

    pid: int
    host: str
    started: float = 0.0

    def __str__(self) -> str:
        pid = self.pid or "unknown"
        return f"pid {pid}" if self.here else f"pid {pid} on {self.host}"

    @property
    def here(self) -> bool:
        return self.host in ("", socket.gethostname())

    @property
    def replaced(self) -> bool:
        """Whether the number ``pid`` of this host belongs to another process by now."""
        now = _started(self.pid)
        return bool(self.started and now) and abs(now - self.started) > _CLOCK_SECONDS


def _started(pid: int) -> float:
    """When the process ``pid`` began; 0 if there is none, or its owner hides it."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def lock_owner(path: Path) -> LockOwner | None:
    """Who holds the lock of the run folder ``path``; None if it is free, or was never taken."""
    try:
        lock = os.open(path / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LaunchError(f"{path / LOCK_FILE} cannot be read: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_owner(lock)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise LaunchError(f"{path / LOCK_FILE} cannot be read: {error.strerror}") from None
    finally:
        os.close(lock)
    return None


def _read_owner(lock: int) -> LockOwner:
    text = os.pread(lock, 512, 0).decode("ascii", "replace")
    pid, host, started = [line.strip() for line in f"{text}\n\n\n".split("\n")[:3]]
    return LockOwner(
        pid=int(pid) if pid.isdigit() else 0,
        host=host,
        started=float(started) if _SECONDS.fullmatch(started) else 0.0,
    )


def _has_begun(path: Path) -> bool:
    """Whether a step was made here. A run that failed before its first one (a wrong path, say)
    leaves only its configuration, and whoever mends that must not need another folder."""
    return any((path / name).exists() for name in _TRACES)


def without_values(lines: Iterable[str]) -> list[str]:
    """The lines of a configuration's differences, those of ``launch.env`` without their values:
    what goes to a terminal or into a log shows no environment."""
    hidden = "launch.env."
    return [
        f"{line.split(':', 1)[0]}: (value not shown)" if line.startswith(hidden) else line
        for line in lines
    ]


def _accept(config: RunConfig, *, path: Path) -> list[str]:
    """The differences from the folder's own configuration, if all of them are allowed."""
    lines = without_values(config_diff(read_config(path), config))
    different = [line for line in lines if not may_change(line.split(":", 1)[0])]
    if different:
        listed = "\n".join(f"    {line}" for line in different)
        raise ConfigError(
            f"run_dir={path} holds a run with another configuration:\n{listed}\n"
            "  Use the old values to resume it, or another run_dir to start anew."
        )
    return [line for line in lines if not line.startswith("run_dir:")]


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"run_dir={path} cannot be written: {error.strerror}; free space there or choose another "
        "run_dir"
    )
