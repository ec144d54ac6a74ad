"""What a save survives: being killed at any point, and a disk without room."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import fork

from emu35.checkpoint.durable import files_below
from emu35.checkpoint.manager import CheckpointManager, find_checkpoint, list_steps
from emu35.config import CheckpointConfig
from emu35.errors import CheckpointError

CHANGING_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def manager(root: Path, *, keep_last: int = 1) -> CheckpointManager:
    return CheckpointManager(
        root=root, config=CheckpointConfig(keep_last=keep_last), identity={}, message=str
    )


def payload(step: int, *, generation: int = 0) -> bytes:
    return b"%d-%d " % (step, generation) * 3000


def writer(step: int, *, generation: int = 0) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        content = payload(step, generation=generation)
        (folder / "shards").mkdir()
        for name in ("model.bin", "shards/a.bin", "shards/b.bin"):
            with (folder / name).open("wb") as file:
                file.write(content[: len(content) // 2])
                file.flush()
                point("half a file", str(folder / name))
                file.write(content[len(content) // 2 :])

    return write


# Set only inside a forked child: called just before each operation that changes the disk.
on_point: Callable[[str, str], None] | None = None


def point(event: str, path: str) -> None:
    if on_point is not None:
        on_point(event, path)


def watch_operations(root: Path) -> None:
    """Report every change below ``root`` that this process is about to make, including fsync."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGING_EVENTS or not arguments:
            return
        if event == "open" and not (isinstance(arguments[1], str) and "w" in arguments[1]):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, Path)) else ""
        # Removal inside a folder is by file descriptor and bare name, hence the second condition.
        if path.startswith(str(root)) or not path.startswith("/"):
            point(event, path)

    sys.addaudithook(hook)
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        point("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)
        point("after fsync", os.readlink(f"/proc/self/fd/{descriptor}"))

    os.fsync = fsync


def run_child(action: Callable[[], None]) -> int:
    """Run ``action`` in a forked process; its wait status (0 when it came to its end)."""
    child = fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            sys.stderr.write(f"child failed: {error!r}\n")
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at(root: Path, *, number: int, save: Callable[[], None]) -> bool:
    """Run ``save`` in a child that kills itself -9 before its ``number``-th disk operation."""

    def action() -> None:
        global on_point
        count = 0

        def kill(event: str, path: str) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        watch_operations(root)
        on_point = kill
        save()

    status = run_child(action)
    assert status in (0, signal.SIGKILL), f"the child ended with status {status}"
    return status == signal.SIGKILL


class Later:
    """What :func:`writer` writes, left to the background."""

    def __init__(self, folder: Path, *, step: int) -> None:
        self.folder, self.step = folder, step

    def stage(self) -> None:
        return None

    def write(self) -> list[str]:
        writer(self.step)(self.folder)
        return files_below(self.folder)

    def finish(self) -> None:
        (self.folder / "contents").write_bytes(b"complete")


def save_in_background(root: Path, step: int) -> None:
    saving = manager(root)
    saving.begin(step, write=lambda folder: Later(folder, step=step), extra={})
    saving.finish()


@pytest.mark.parametrize(
    ("background", "every"),
    [
        pytest.param(False, 1, marks=pytest.mark.slow),
        pytest.param(True, 1, marks=pytest.mark.slow),
        (True, 4),
    ],
    ids=["foreground", "background", "background-some"],
)
def test_killed_at_every_write_point_a_loadable_run_remains(
    tmp_path: Path, background: bool, every: int
) -> None:
    def save(step: int) -> None:
        if background:
            save_in_background(root, step)
        else:
            manager(root).save(step, write=writer(step), extra={})

    before = tmp_path / "before"
    manager(before).save(100, write=writer(100), extra={})
    root = tmp_path / "run"
    survivors: list[int] = []
    for number in range(1, 500, every):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)
        killed = killed_at(root, number=number, save=lambda: save(200))
        found = find_checkpoint(root, message=str)
        assert found is not None
        assert (found.path / "shards" / "b.bin").read_bytes() == payload(found.step)
        survivors.append(found.step)
        # The next start cleans up and goes on.
        save(300)
        assert [path.name for path in root.iterdir()] == ["step_00000300"]
        if not killed:
            break
    else:
        pytest.fail("the save never came to its end")
    assert len(survivors) * every > 30
    # The new checkpoint exists from one moment on, and never ceases to exist again.
    assert survivors == sorted(survivors)
    assert set(survivors) == {100, 200}


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_while_replacing_the_same_step(tmp_path: Path, every: int) -> None:
    before = tmp_path / "before"
    manager(before).save(100, write=writer(100), extra={})
    root = tmp_path / "run"
    generations: list[bytes] = []
    for number in range(1, 500, every):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)
        save = manager(root).save
        killed = killed_at(
            root,
            number=number,
            save=lambda save=save: void(save(100, write=writer(100, generation=1), extra={})),
        )
        found = manager(root).latest()
        assert found is not None
        generations.append((found.path / "model.bin").read_bytes())
        if not killed:
            break
    assert set(generations) == {payload(100), payload(100, generation=1)}
    assert generations == sorted(generations)


def test_nothing_is_renamed_before_it_is_durable(tmp_path: Path) -> None:
    """A power cut keeps only what was synced, so the order of operations is the whole point."""
    root = tmp_path / "run"
    root.mkdir()
    log = tmp_path / "log"

    def action() -> None:
        global on_point
        watch_operations(root)
        file = os.open(log, os.O_CREAT | os.O_WRONLY)
        on_point = lambda event, path: void(os.write(file, f"{event}\t{path}\n".encode()))  # noqa: E731
        manager(root).save(1, write=writer(1), extra={})

    assert run_child(action) == 0
    events = [line.split("\t") for line in log.read_text().splitlines()]
    temporary = root / ".tmp-step_00000001"
    rename = events.index(["os.rename", str(temporary)])
    synced = {path for event, path in events[:rename] if event == "after fsync"}
    whole = root / "step_00000001"
    for path in [whole, *whole.rglob("*")]:
        name = str(temporary / path.relative_to(whole))
        if path.name == "manifest.json":
            name = str(temporary / ".manifest.json.")
        assert any(path.startswith(name) for path in synced), f"{name} was not durable"
    assert ["after fsync", str(root)] in events[rename:]


def void(_: object) -> None:
    return None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 256 KiB, where this user may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small filesystem is not permitted here")
    yield place
    # Lazily: torch keeps the file of a failed save open for as long as the exception lives.
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("kilobytes", [120, 150, 151, 152, 155, 300])
def test_full_disk_names_the_folder_and_keeps_the_previous(
    small_disk: Path, kilobytes: int
) -> None:
    kept = manager(small_disk)
    kept.save(100, write=lambda f: void((f / "a").write_bytes(b"a" * 100_000)), extra={})

    def write(folder: Path) -> None:
        (folder / "a").write_bytes(b"b" * 1024 * kilobytes)

    try:
        kept.save(200, write=write, extra={"note": "x" * 5000})
    except CheckpointError as error:
        text = str(error)
        assert str(small_disk) in text
        assert "No space left on device" in text
        assert "bytes free" in text
        assert "step 100 needed 100,000 bytes and is intact" in text
        assert list_steps(small_disk) == [100]
        assert [path.name for path in small_disk.iterdir()] == ["step_00000100"]
        found = kept.latest()
        assert found is not None
        assert found.step == 100
    else:
        assert kilobytes == 120
        assert list_steps(small_disk) == [200]


def test_file_size_limit_is_reported_like_a_full_disk(tmp_path: Path) -> None:
    """Needs no privilege, unlike a mount: the kernel refuses to let a file grow."""
    manager(tmp_path).save(100, write=writer(100), extra={})

    def action() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(CheckpointError, match="File too large"):
            manager(tmp_path).save(200, write=writer(200), extra={})

    assert run_child(action) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000100"]
    assert manager(tmp_path).latest() is not None


def test_torch_save_on_a_full_disk_is_a_checkpoint_error(small_disk: Path) -> None:
    import torch

    kept = manager(small_disk)
    with pytest.raises(CheckpointError, match="cannot save"):
        kept.save(1, write=lambda f: torch.save(torch.zeros(200_000), f / "model.pt"), extra={})
    assert list(small_disk.iterdir()) == []
