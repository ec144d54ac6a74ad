"""Saving, finding and rotating the checkpoints of a run.

A save (:mod:`emu35.checkpoint.saving`) fills a temporary folder and renames it at the very end;
only then may anything be deleted. One save at a time may be written in the background
(:meth:`CheckpointManager.begin`).

Two more names can be met after a kill. ``.replaced-step_N`` is an older folder of the same step,
put aside for the instant between two renames; the next start puts it back if the new one never
arrived. ``.old-step_N`` is a rotated folder on its way out.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu35.checkpoint.agree import gather, on_all_ranks
from emu35.checkpoint.manifest import (
    DamagedError,
    check_file,
    differences,
    plain,
    read_manifest,
)
from emu35.checkpoint.saving import REPLACED, TEMPORARY, Saving, Write, unwritten
from emu35.checkpoint.steps import STEP_NAME, list_steps, step_folder
from emu35.config import CheckpointConfig
from emu35.config.io import complete_identity
from emu35.errors import CheckpointError
from emu35.parallel.collectives import is_main, rank, world_size

OLD = ".old-"


@dataclass(kw_only=True, slots=True, frozen=True)
class Checkpoint:
    """A verified checkpoint. ``extra`` is what was given to ``save``."""

    path: Path
    step: int
    extra: dict[str, Any]
    identity: dict[str, Any]


def verify_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint folder completely: manifest, sizes, hashes. Collective.

    Every rank reads the manifest and hashes its share of the files; all get the same answer.

    Raises:
        DamagedError: naming the first damaged file and what is wrong with it.
    """
    manifest, problem = None, None
    try:
        manifest = read_manifest(path)
        if step_folder(manifest.step) != path.name:
            problem = f"its manifest says step {manifest.step}"
    except DamagedError as error:
        problem = str(error)
    _raise_first(problem)
    assert manifest is not None
    share = sorted(manifest.files)[rank() :: world_size()]
    checks = (check_file(path, name=name, entry=manifest.files[name]) for name in share)
    _raise_first(next((text for text in checks if text), None))
    return Checkpoint(
        path=path, step=manifest.step, extra=manifest.extra, identity=manifest.identity
    )


def find_checkpoint(
    root: Path,
    *,
    step: int | None = None,
    message: Callable[[str], object] = print,
    skipped: set[int] | None = None,
) -> Checkpoint | None:
    """The newest valid checkpoint in ``root`` (or that of ``step``); None where there is none.

    Changes nothing on disk, so it may look at a run that is training. Each damaged folder is told
    to ``message`` with the reason, and its step added to ``skipped``. Collective.

    Raises:
        CheckpointError: every checkpoint is damaged, or ``step`` is damaged or missing. Nothing is
            returned then rather than None, because a run that started over in such a folder would
            rotate away what might still be rescued.
    """
    steps = gather(list_steps(root))[0]
    if step is not None:
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"no checkpoint of step {step} in {root}; there are: {there}")
        steps = [step]
    reasons: list[str] = []
    for candidate in reversed(steps):
        path = root / step_folder(candidate)
        try:
            return verify_checkpoint(path)
        except DamagedError as error:
            reasons.append(f"{path.name}: {error}")
            message(f"skipped checkpoint {path}: {error}")
            if skipped is not None:
                skipped.add(candidate)
    if reasons:
        raise CheckpointError(
            f"no usable checkpoint in {root}: {'; '.join(reasons)}. "
            "Restore a copy, or move the folder away to start from the beginning"
        )
    return None


class CheckpointManager:
    """Writes and finds the checkpoints of one run. Every rank makes one and calls every method.

    Making it removes what killed saves left behind, so only the process that trains may make it;
    readers use :func:`find_checkpoint`.

    Args:
        root: folder that holds the step folders; made at the first save.
        config: how many checkpoints stay.
        identity: what a checkpoint must share with this run to be continued (JSON-able, nested);
            a difference is reported leaf by leaf.
        message: told about skipped and removed folders, on rank 0 only.
    """

    def __init__(
        self,
        *,
        root: Path,
        config: CheckpointConfig,
        identity: Mapping[str, Any],
        message: Callable[[str], object] = print,
    ) -> None:
        self.root = root
        self.config = config
        self.identity = plain(identity)
        self._tell = message if is_main() else _say_nothing
        self._damaged: set[int] = set()
        self._saving: Saving | None = None
        on_all_ranks(
            self._remove_leftovers, blame=lambda why: f"cannot clean the folder {root}: {why}"
        )

    def latest(self, step: int | None = None) -> Checkpoint | None:
        """The newest valid checkpoint of this very configuration, or that of ``step``. Fields that
        the configuration did not have when it was written count as their defaults.

        Raises:
            CheckpointError: checkpoints exist but none is usable, or the newest usable one belongs
                to another configuration (all differences are listed).
        """
        found = find_checkpoint(self.root, step=step, message=self._tell, skipped=self._damaged)
        if found is None:
            return None
        saved = complete_identity(found.identity, wanted=self.identity)
        changes = list(differences(self.identity, saved))
        if changes:
            listed = "\n".join(f"  - {change}" for change in changes)
            raise CheckpointError(
                f"{found.path} belongs to another configuration:\n{listed}\n"
                "Use the old values to continue it, or another run_dir to start anew"
            )
        return found

    def save(
        self,
        step: int,
        *,
        write: Write,
        extra: Mapping[str, Any],
        write_alone: Callable[[Path], object] | None = None,
    ) -> Checkpoint:
        """Make the checkpoint of ``step``; ``write`` fills the folder it is given, on every rank.

        What a rank writes without the others belongs into ``write_alone``: that must succeed
        everywhere before ``write`` begins, whose collectives would wait for a rank that failed.
        A checkpoint of the same step is replaced. Rotation follows only after success, and trouble
        while rotating is a message, not a failure.

        Raises:
            CheckpointError: on every rank alike when a rank could not write; the temporary folder
                is gone and the previous checkpoints are as they were.
        """
        self._begin(step, write=write, extra=extra, write_alone=write_alone, background=False)
        return self.finish()

    def begin(
        self,
        step: int,
        *,
        write: Write,
        extra: Mapping[str, Any],
        write_alone: Callable[[Path], object] | None = None,
    ) -> None:
        """As :meth:`save`, but return as soon as the state is copied; :meth:`finish` must follow.

        Until then :attr:`in_flight` holds, no other save may begin, and on the disk the previous
        checkpoint is the newest one.

        Raises:
            CheckpointError: as :meth:`save`, for what failed so far.
        """
        self._begin(step, write=write, extra=extra, write_alone=write_alone, background=True)

    @property
    def in_flight(self) -> bool:
        """Whether a save has begun and is not finished; the same on every rank."""
        return self._saving is not None

    def is_written(self) -> bool:
        """Whether every rank has written its part of the save in flight. One small collective."""
        return self._saving is not None and self._saving.is_written()

    def finish(self) -> Checkpoint:
        """Complete the save in flight, waiting for what is not written yet. Collective.

        Raises:
            CheckpointError: as :meth:`save`.
        """
        saving, self._saving = self._saving, None
        assert saving is not None, "no save has begun"
        manifest = saving.finish()
        self._damaged.discard(manifest.step)
        if is_main():
            self._rotate(manifest.step)
        return Checkpoint(
            path=saving.final, step=manifest.step, extra=manifest.extra, identity=self.identity
        )

    def close(self) -> None:
        """Give up a save in flight, as an error elsewhere demands. Not collective."""
        if self._saving is not None:
            self._saving.abandon()

    def _begin(
        self,
        step: int,
        *,
        write: Write,
        extra: Mapping[str, Any],
        write_alone: Callable[[Path], object] | None,
        background: bool,
    ) -> None:
        assert self._saving is None, "one save at a time: finish the one in flight"
        final = self.root / step_folder(step)
        saving = Saving(
            final=final,
            manifest=unwritten(step, identity=self.identity, extra=extra),
            blame=lambda why: f"cannot save {final}: {why}. {self._space()}",
        )
        saving.begin(write=write, write_alone=write_alone, background=background)
        self._saving = saving

    def _rotate(self, saved: int) -> None:
        """Delete what need not stay, now that ``saved`` is safely there.

        Folders of later steps are left alone: a run that resumed below them found them damaged (or
        was told to), and will replace them when it gets there.
        """
        steps = [step for step in list_steps(self.root) if step <= saved]
        sound = [step for step in steps if step not in self._damaged]
        every = self.config.keep_every
        keep = {saved, *sound[-self.config.keep_last :]}
        keep |= {step for step in sound if every and step % every == 0}
        try:
            for folder in self.root.glob(f"{REPLACED}*"):
                shutil.rmtree(folder)
            for step in steps:
                if step not in keep:
                    # Renamed first, so that a kill in mid-deletion leaves no half checkpoint.
                    going = self.root / f"{OLD}{step_folder(step)}"
                    (self.root / step_folder(step)).rename(going)
                    shutil.rmtree(going)
        except OSError as error:
            self._tell(f"old checkpoints in {self.root} could not be removed: {error}")

    def _remove_leftovers(self) -> None:
        if not is_main() or not self.root.is_dir():
            return
        for path in sorted(self.root.iterdir()):
            for prefix in (TEMPORARY, REPLACED, OLD):
                name = path.name.removeprefix(prefix)
                if name == path.name or not STEP_NAME.fullmatch(name):
                    continue
                if prefix is REPLACED and not (self.root / name).exists():
                    path.rename(self.root / name)
                    self._tell(f"put back {self.root / name}, whose replacement was interrupted")
                else:
                    shutil.rmtree(path)
                    self._tell(f"removed {path}, left by a save or rotation that was interrupted")

    def _space(self) -> str:
        """How much room there is and how much is wanted, as far as that is known."""
        place = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        words = [f"The folder {self.root} has {shutil.disk_usage(place).free:,} bytes free"]
        for step in reversed(list_steps(self.root)):
            with suppress(DamagedError):
                size = read_manifest(self.root / step_folder(step)).total_size
                words.append(f"the checkpoint of step {step} needed {size:,} bytes and is intact")
                break
        return "; ".join(words) + ". Free some space and run the same command again"


def _raise_first(problem: str | None) -> None:
    """Raise on every rank what some rank has found. Collective."""
    first = next(filter(None, _non_empty(gather(problem))), None)
    if first:
        raise DamagedError(first)


def _non_empty(problems: list[str | None]) -> Iterator[str]:
    return (problem for problem in problems if problem)


def _say_nothing(text: str) -> None:
    del text
