"""One save on its way from nothing to a checkpoint.

Each line happens on every rank and is followed by an exchange of failures::

    .tmp-step_00000300/          rank 0 makes the temporary folder          begin
      (small files)              every rank writes its own                  begin
      (the state, planned)       copied where it is written in background   begin
      (the state)                every rank writes and hashes its part      begin, or a thread
      manifest.json              the rest is hashed, rank 0 lists all       finish
    step_00000300/               rank 0 renames, then syncs the root        finish

In the background means on one thread a rank, which exchanges nothing: whatever needs the other
ranks is done by ``begin`` and ``finish``, on the main thread between two steps.
"""

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from emu35.checkpoint.agree import gather, on_all_ranks
from emu35.checkpoint.durable import files_below, folders_below
from emu35.checkpoint.manifest import (
    FileEntry,
    Manifest,
    current_versions,
    describe_file,
    plain,
    write_manifest,
)
from emu35.checkpoint.staged import StagedWrite
from emu35.files import sync_folder
from emu35.parallel.collectives import all_agree, is_main, rank, world_size

TEMPORARY, REPLACED = ".tmp-", ".replaced-"

Write = Callable[[Path], StagedWrite | None]
"""Fills a folder; what it returns is still to be written."""


class Saving:
    """The save of one step. Every rank makes one; every method but :meth:`abandon` is collective.

    Args:
        final: the checkpoint's folder to be.
        manifest: its manifest, without the files.
        blame: what to say of a failure, given the reasons.
    """

    def __init__(self, *, final: Path, manifest: Manifest, blame: Callable[[str], str]) -> None:
        self.final, self.manifest, self.blame = final, manifest, blame
        self.temporary = final.with_name(f"{TEMPORARY}{final.name}")
        self._staged: StagedWrite | None = None
        self._entries: dict[str, FileEntry] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(
        self,
        *,
        write: Write,
        write_alone: Callable[[Path], object] | None,
        background: bool,
    ) -> None:
        """Everything up to the writing of the state; with ``background`` that has begun then.

        Raises:
            CheckpointError: on every rank alike; the temporary folder is gone.
        """
        with self._leaving_nothing():
            on_all_ranks(self._prepare, blame=self.blame)
            if write_alone is not None:
                on_all_ranks(lambda: write_alone(self.temporary), blame=self.blame)
            self._staged = on_all_ranks(lambda: write(self.temporary), blame=self.blame)
            staged = self._staged
            if background and staged is not None:
                on_all_ranks(staged.stage, blame=self.blame)
                # A thread begins on the first device, whichever its process works on.
                device = torch.cuda.current_device() if torch.cuda.is_available() else None
                self._thread = threading.Thread(
                    target=self._write_apart, kwargs={"device": device}, name="checkpoint"
                )
                self._thread.start()

    def is_written(self) -> bool:
        """Whether :meth:`finish` would wait for no rank's thread."""
        return all_agree(self._thread is None or not self._thread.is_alive())

    def finish(self) -> Manifest:
        """Wait for every rank's files, list them and make the checkpoint appear.

        Raises:
            CheckpointError: on every rank alike; the temporary folder is gone.
        """
        with self._leaving_nothing():
            on_all_ranks(self._written, blame=self.blame)
            if self._staged is not None:
                on_all_ranks(self._staged.finish, blame=self.blame)
            names = on_all_ranks(self._names, blame=self.blame)
            done = {name: entry for part in gather(self._entries) for name, entry in part.items()}
            share = sorted(set(gather(names)[0]) - done.keys())[rank() :: world_size()]
            rest = on_all_ranks(lambda: _describe(self.temporary, names=share), blame=self.blame)
            self.manifest.files.update(done)
            for part in gather(rest):
                self.manifest.files.update(part)
            on_all_ranks(self._publish, blame=self.blame)
        return self.manifest

    def abandon(self) -> None:
        """Wait for this rank's thread; what it wrote is removed by the next start."""
        if self._thread is not None:
            self._thread.join()

    @contextmanager
    def _leaving_nothing(self) -> Iterator[None]:
        """A failure removes the temporary folder."""
        try:
            yield
        except BaseException:
            if is_main():
                self.abandon()
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise

    def _prepare(self) -> None:
        if not is_main():
            return
        root = self.final.parent
        if not root.is_dir():
            root.mkdir(parents=True)
            sync_folder(root.parent)
        if self.temporary.exists():
            shutil.rmtree(self.temporary)
        self.temporary.mkdir()

    def _write_apart(self, *, device: int | None) -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            self._write()
        except BaseException as error:  # raised by finish, on the main thread
            self._error = error

    def _write(self) -> None:
        if self._staged is not None:
            self._entries = _describe(self.temporary, names=self._staged.write())

    def _written(self) -> None:
        if self._thread is None:
            self._write()
            return
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _names(self) -> list[str]:
        """What lies in the folder; only the main rank looks, the others take its word."""
        return files_below(self.temporary) if is_main() else []

    def _publish(self) -> None:
        if not is_main():
            return
        write_manifest(self.manifest, folder=self.temporary)
        for folder in folders_below(self.temporary):
            sync_folder(folder)
        aside = self.final.with_name(f"{REPLACED}{self.final.name}")
        if self.final.exists():
            if aside.exists():
                shutil.rmtree(aside)
            self.final.rename(aside)
        try:
            self.temporary.rename(self.final)
        except OSError:
            if aside.exists():
                aside.rename(self.final)
            raise
        sync_folder(self.final.parent)


def unwritten(step: int, *, identity: Mapping[str, Any], extra: Mapping[str, Any]) -> Manifest:
    """The manifest of a save that begins now: ``extra`` as it is at this moment."""
    return Manifest(
        step=step,
        files={},
        identity=plain(identity),
        extra=plain(extra),
        versions=current_versions(),
    )


def _describe(folder: Path, *, names: list[str]) -> dict[str, FileEntry]:
    return {name: describe_file(folder, name=name) for name in names}
