import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emu35.checkpoint.durable import is_inside
from emu35.checkpoint.manager import CheckpointManager, find_checkpoint, list_steps
from emu35.checkpoint.manifest import MANIFEST, identity_hash
from emu35.config import (
    CheckpointConfig,
    Overlong,
    Packing,
    RunConfig,
    SourceConfig,
    TokenDataConfig,
    ValidationConfig,
)
from emu35.config.io import run_identity
from emu35.errors import CheckpointError

IDENTITY = {"seed": 1, "optim": {"lr": 0.1, "betas": [0.9, 0.95]}}


def payload(step: int) -> dict[str, bytes]:
    return {"model.bin": bytes([step % 251]) * 5000, "rank/part_0.bin": b"p%d" % step}


def writer(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "rank").mkdir()
        for name, content in payload(step).items():
            (folder / name).write_bytes(content)

    return write


def manager(root: Path, *, messages: list[str] | None = None, **config: Any) -> CheckpointManager:
    said = messages if messages is not None else []
    return CheckpointManager(
        root=root, config=CheckpointConfig(**config), identity=IDENTITY, message=said.append
    )


def save_steps(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(step, write=writer(step), extra={"data": {"cursor": step}})


def assert_whole(root: Path, *, step: int) -> None:
    found = find_checkpoint(root, step=step)
    assert found is not None
    for name, content in payload(step).items():
        assert (found.path / name).read_bytes() == content
    assert found.extra == {"data": {"cursor": step}}


def test_saved_state_comes_back(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    assert manager(root).latest() is None
    save_steps(manager(root), 100, 200)
    found = manager(root).latest()
    assert found is not None
    assert (found.step, found.path) == (200, root / "step_00000200")
    assert_whole(root, step=200)
    assert_whole(root, step=100)


def test_manifest_lists_every_file_with_size_hash_identity_and_versions(tmp_path: Path) -> None:
    save_steps(manager(tmp_path), 7)
    body = json.loads((tmp_path / "step_00000007" / MANIFEST).read_text())
    assert set(body["files"]) == set(payload(7))
    assert body["files"]["model.bin"]["size"] == 5000
    assert body["step"] == 7
    assert body["identity_sha256"] == identity_hash(IDENTITY)
    assert {"emu35", "torch", "megatron-core"} <= set(body["versions"])


@pytest.mark.parametrize(
    ("config", "left"),
    [
        ({"keep_last": 2}, [400, 500]),
        ({"keep_last": 1}, [500]),
        ({"keep_last": 1, "keep_every": 200}, [200, 400, 500]),
    ],
)
def test_rotation(tmp_path: Path, config: dict[str, Any], left: list[int]) -> None:
    save_steps(manager(tmp_path, **config), 100, 200, 300, 400, 500)
    assert list_steps(tmp_path) == left
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{s:08d}" for s in left]


def test_a_failed_save_deletes_nothing(tmp_path: Path) -> None:
    kept = manager(tmp_path, keep_last=1)
    save_steps(kept, 100)

    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x" * 100)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError) as caught:
        kept.save(200, write=fail, extra={})
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "No space left on device" in text
    assert "bytes free" in text
    assert f"step 100 needed {5000 + 4:,} bytes and is intact" in text
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000100"]
    assert_whole(tmp_path, step=100)


def test_a_bug_in_a_writer_keeps_its_own_type_and_leaves_nothing(tmp_path: Path) -> None:
    def bug(folder: Path) -> None:
        (folder / "half").write_bytes(b"")
        raise KeyError("exp_avg")

    with pytest.raises(KeyError, match="exp_avg"):
        manager(tmp_path).save(1, write=bug, extra={})
    assert list(tmp_path.iterdir()) == []


def flip_bit(path: Path, *, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "first bit": lambda path: flip_bit(path, position=0),
    "middle bit": lambda path: flip_bit(path, position=path.stat().st_size // 2),
    "last bit": lambda path: flip_bit(path, position=-1),
    "truncated": truncate,
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "link": lambda path: (shutil.copy(path, path.parent.parent / "x"), path.unlink(),
                          path.symlink_to(path.parent.parent / "x")),
}  # fmt: skip


# A manifest behind a link still proves its own content, so that pair is no damage.
@pytest.mark.parametrize(
    ("name", "damage"),
    [(n, d) for n in [*payload(0), MANIFEST] for d in DAMAGE if (n, d) != (MANIFEST, "link")],
)
def test_damage_is_named_and_the_previous_checkpoint_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    save_steps(manager(tmp_path), 100, 200)
    DAMAGE[damage](tmp_path / "step_00000200" / name)
    messages: list[str] = []
    found = manager(tmp_path, messages=messages).latest()
    assert found is not None
    assert found.step == 100
    assert len(messages) == 1
    assert "step_00000200" in messages[0]
    assert name in messages[0]


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    save_steps(manager(tmp_path), 100, 200)
    path = tmp_path / "step_00000200" / MANIFEST
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        found = manager(tmp_path).latest()
        assert found is not None
        assert found.step == 100, f"bit flip at byte {position} went unnoticed"


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    save_steps(manager(tmp_path), 100, 200)
    truncate(tmp_path / "step_00000100" / "model.bin")
    truncate(tmp_path / "step_00000200" / MANIFEST)
    with pytest.raises(CheckpointError, match=r"step_00000200: .*step_00000100: model\.bin"):
        manager(tmp_path).latest()


def test_rotation_never_counts_on_a_damaged_checkpoint(tmp_path: Path) -> None:
    save_steps(manager(tmp_path, keep_last=3), 100, 200, 300)
    truncate(tmp_path / "step_00000200" / "model.bin")
    truncate(tmp_path / "step_00000300" / "model.bin")
    resumed = manager(tmp_path, keep_last=2)
    found = resumed.latest()
    assert found is not None
    assert found.step == 100
    save_steps(resumed, 250)
    # 250 and 100 are sound and stay; 200 is damaged and goes; 300 will be replaced in its time.
    assert list_steps(tmp_path) == [100, 250, 300]
    save_steps(resumed, 300)
    assert list_steps(tmp_path) == [250, 300]
    assert_whole(tmp_path, step=300)


def test_another_configuration_is_refused_leaf_by_leaf(tmp_path: Path) -> None:
    save_steps(manager(tmp_path), 100)
    other = CheckpointManager(
        root=tmp_path,
        config=CheckpointConfig(),
        identity={"seed": 1, "optim": {"lr": 0.2, "betas": (0.9, 0.95)}, "name": "x"},
    )
    with pytest.raises(CheckpointError) as caught:
        other.latest()
    text = str(caught.value)
    assert "optim.lr: 0.1 in the checkpoint, 0.2 here" in text
    assert "name: 'absent' in the checkpoint, 'x' here" in text
    assert "seed" not in text
    assert "betas" not in text


LATER = ("adapter", "lora", "new_rows", "packing", "overlong", "every")


def recipe(**changes: Any) -> RunConfig:
    data = TokenDataConfig(
        sources={"web": SourceConfig(path="shards/web", ratio=0.5)},
        validation={"text": ValidationConfig(path="shards/held-out")},
        **changes,
    )
    return RunConfig(data=data)


def save_without_later_fields(root: Path, *, config: RunConfig) -> None:
    """As a version did that had none of the fields ``LATER``."""
    identity = {
        key: value
        for key, value in run_identity(config).items()
        if not set(key.split(".")) & set(LATER)
    }
    assert len(run_identity(config)) - len(identity) >= len(LATER)
    made = CheckpointManager(root=root, config=CheckpointConfig(), identity=identity)
    save_steps(made, 100)


def resume(root: Path, *, config: RunConfig) -> int:
    identity = run_identity(config)
    found = CheckpointManager(root=root, config=CheckpointConfig(), identity=identity).latest()
    assert found is not None
    return found.step


def test_a_checkpoint_older_than_a_field_continues_with_its_default(tmp_path: Path) -> None:
    save_without_later_fields(tmp_path, config=recipe())
    assert resume(tmp_path, config=recipe()) == 100


def test_a_checkpoint_older_than_a_field_refuses_another_value(tmp_path: Path) -> None:
    save_without_later_fields(tmp_path, config=recipe())
    other = recipe(overlong=Overlong.drop)
    assert isinstance(other.data, TokenDataConfig)
    other.data.sources["web"].packing = Packing.offline
    other.data.validation["text"].every = 3
    with pytest.raises(CheckpointError) as caught:
        resume(tmp_path, config=other)
    listed = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert listed == [
        "  - data.overlong: 'cut' in the checkpoint, 'drop' here",
        "  - data.sources.web.packing: None in the checkpoint, 'offline' here",
        "  - data.validation.text.every: 1 in the checkpoint, 3 here",
    ]


def test_leftovers_of_killed_saves_are_removed_at_the_next_start(tmp_path: Path) -> None:
    save_steps(manager(tmp_path), 100)
    for name in (".tmp-step_00000200", ".old-step_00000050", ".replaced-step_00000100"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_bytes(b"x")
    (tmp_path / ".tmp-notes").mkdir()
    messages: list[str] = []
    manager(tmp_path, messages=messages)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-notes", "step_00000100"]
    assert len(messages) == 3


def test_an_interrupted_replacement_is_put_back(tmp_path: Path) -> None:
    save_steps(manager(tmp_path), 100)
    (tmp_path / "step_00000100").rename(tmp_path / ".replaced-step_00000100")
    found = manager(tmp_path).latest()
    assert found is not None
    assert_whole(tmp_path, step=100)


def test_a_named_step_can_be_asked_for(tmp_path: Path) -> None:
    save_steps(manager(tmp_path), 100, 200)
    found = manager(tmp_path).latest(step=100)
    assert found is not None
    assert found.step == 100
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 150 .*100, 200"):
        find_checkpoint(tmp_path, step=150)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "", ".", "a\\b", "a\0b", "a//b", "./a", "a/"]
)
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    assert not is_inside(name)


def test_ordinary_names_are_accepted() -> None:
    assert is_inside("model.bin")
    assert is_inside("rank/part..0.bin")


def test_a_manifest_that_names_a_path_outside_is_refused(tmp_path: Path) -> None:
    save_steps(manager(tmp_path), 100, 200)
    path = tmp_path / "step_00000200" / MANIFEST
    body = json.loads(path.read_text())
    del body["manifest_sha256"]
    body["files"]["../step_00000100/model.bin"] = body["files"].pop("model.bin")

    def render() -> bytes:
        return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()

    body["manifest_sha256"] = hashlib.sha256(render()).hexdigest()
    path.write_bytes(render())
    messages: list[str] = []
    found = manager(tmp_path, messages=messages).latest()
    assert found is not None
    assert found.step == 100
    assert "'../step_00000100/model.bin'" in messages[0]
