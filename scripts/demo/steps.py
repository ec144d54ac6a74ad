"""Steps that are done once: a stamp each, times that add up over interruptions, commands in sight.

The state of a demo is the folder ``OUT/.steps``: ``settings.json`` says what it was started with,
``NAME.json`` how long a step took so far and whether it is done. A step must be safe to run again
from its beginning after it was killed anywhere; ``emu35`` itself resumes what is costly.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

HEARTBEAT_SECONDS = 2.0
"""How often the time spent is written down, so that even a kill loses little of it."""


class Stopped(Exception):
    """The demo was asked to stop, or a command stopped by itself; ``code`` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """``title`` is printed; ``run`` does the work, in order of the list it stands in."""

    name: str
    title: str
    run: Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Clock:
    """Time spent in the step that is running, earlier attempts included."""

    step: str
    spent: float
    begin: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.begin


@dataclass(kw_only=True, slots=True)
class Runner:
    """Runs steps in ``out`` and knows how long each took."""

    out: Path
    _clock: _Clock | None = None
    _child: "subprocess.Popen[bytes] | None" = None
    _signalled: bool = False

    @property
    def folder(self) -> Path:
        return self.out / ".steps"

    def claim(self, settings: dict[str, Any]) -> list[str]:
        """Bind ``out`` to ``settings``; names those in which an earlier demo there differs."""
        path = self.folder / "settings.json"
        if not path.exists():
            write_json(path, settings)
            return []
        # Compared as JSON has them: a tuple comes back as a list.
        before, now = json.loads(path.read_text()), json.loads(json.dumps(settings))
        return [key for key in now if before.get(key) != now[key]]

    def catch_signals(self) -> None:
        """From now on a signal is passed to the command that runs, which saves itself."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._child is None:
            # Nothing to wait for: our own work starts over, so it can end anywhere.
            raise Stopped(130 if number == signal.SIGINT else 75)
        self._signalled = True
        self._child.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def run(self, steps: Sequence[Step], *, until: str | None) -> None:
        """Every step that is not done, up to and including ``until``."""
        for number, step in enumerate(steps, start=1):
            head = f"[{number}/{len(steps)}] {step.title}"
            record = self._record(step.name)
            if record.get("done"):
                say(f"{head}: done before, in {duration(record['seconds'])}")
            else:
                say(head)
                self._run_one(step, spent=record.get("seconds", 0.0))
            if step.name == until:
                break

    def _run_one(self, step: Step, *, spent: float) -> None:
        self._clock = clock = _Clock(step=step.name, spent=spent)
        try:
            step.run()
        finally:
            self._heartbeat()
            self._clock = None
        write_json(self._path(step.name), {"seconds": clock.seconds, "done": True})
        say(f"      {duration(clock.seconds)}")

    def _heartbeat(self) -> None:
        if self._clock is not None:
            record = {"seconds": self._clock.seconds, "done": False}
            write_json(self._path(self._clock.step), record)

    def seconds(self, name: str) -> float:
        """Time spent in a step, interrupted attempts included; a running one counts until now."""
        self._heartbeat()
        return float(self._record(name).get("seconds", 0.0))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _record(self, name: str) -> dict[str, Any]:
        path = self._path(name)
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def commands(self) -> list[str]:
        """Every ``emu35`` command so far, those of earlier attempts included, each once."""
        path = self._path("commands")
        return json.loads(path.read_text()) if path.exists() else []

    def emu35(self, *arguments: str) -> None:
        """Run ``emu35 ARGUMENTS`` in the current folder, showing the command.

        Raises:
            Stopped: with the command's exit code where that is not 0.
        """
        self._run_emu35(arguments, output=None)

    def emu35_json(self, *arguments: str) -> Any:
        """:meth:`emu35` for a command that prints one JSON value, and its report on stderr.

        Raises:
            Stopped: with the command's exit code where that is not 0.
        """
        with tempfile.TemporaryFile() as output:
            self._run_emu35(arguments, output=output)
            output.seek(0)
            return json.load(output)

    def _run_emu35(self, arguments: Sequence[str], *, output: IO[bytes] | None) -> None:
        command = shlex.join(["emu35", *arguments])
        say(f"  $ {command}")
        if command not in self.commands:
            write_json(self._path("commands"), [*self.commands, command])
        # A session of its own: Ctrl-C reaches this process only, which passes it on once.
        self._child = subprocess.Popen(
            [sys.executable, "-m", "emu35", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            start_new_session=True,
        )
        try:
            code = self._wait(self._child)
        finally:
            self._child = None
        if self._signalled:
            raise Stopped(code if code > 0 else 75)
        if code != 0:
            say(f"emu35 ended with exit code {code}")
            raise Stopped(code if code > 0 else 1)

    def _wait(self, child: "subprocess.Popen[bytes]") -> int:
        while True:
            try:
                return child.wait(timeout=HEARTBEAT_SECONDS)
            except subprocess.TimeoutExpired:
                self._heartbeat()


def say(text: str) -> None:
    print(text, flush=True)


def shown(path: Path) -> str:
    """Relative to where the demo was started, so that printed commands can be typed as they are."""
    return os.path.relpath(path)


def duration(seconds: float) -> str:
    """``4.2 s`` or ``3 min 05 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(value, indent=1))


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
