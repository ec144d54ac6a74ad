"""Checkpoints that would run code when torch loads them."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from emu35.checkpoint import sharded
from emu35.checkpoint.unpickle import METADATA, refuse_code
from emu35.config import LMConfig
from emu35.errors import CheckpointError
from emu35.model.build import build_model
from emu35.model.init import initialize
from emu35.parallel.mesh import single_process_mesh

MODEL = LMConfig(
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    single_process_mesh()
    model = build_model(MODEL, vocabulary_size=32)
    initialize(model, seed=0)
    place = tmp_path / "step_00000001"
    place.mkdir()
    sharded.save(place, chunks=[model], optimizer=None)
    return place


def metadata_of(folder: Path) -> tuple[Path, Any]:
    path = folder / sharded.STATE_FOLDER / METADATA
    return path, pickle.loads(path.read_bytes())


def test_our_own_checkpoints_pass(folder: Path) -> None:
    assert list(folder.rglob(METADATA))
    refuse_code(folder)


def test_a_table_of_contents_that_runs_code(folder: Path, tmp_path: Path) -> None:
    path, metadata = metadata_of(folder)
    metadata.planner_data = Touch(tmp_path / "owned")
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"posix\.mkdir is not data"):
        refuse_code(folder)
    assert not (tmp_path / "owned").exists()
    # What would have happened: the check is no formality.
    pickle.loads(path.read_bytes())
    assert (tmp_path / "owned").exists()


def test_an_entry_that_runs_code(folder: Path, tmp_path: Path) -> None:
    path, metadata = metadata_of(folder)
    evil = folder / sharded.STATE_FOLDER / "evil.distcp"
    torch.save(Touch(tmp_path / "owned"), evil)
    metadata.state_dict_metadata["history"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("history")] = _StorageInfo(
        relative_path=evil.name, offset=0, length=evil.stat().st_size
    )
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="history"):
        refuse_code(folder)
    assert not (tmp_path / "owned").exists()


def test_an_entry_outside_the_folder(folder: Path) -> None:
    path, metadata = metadata_of(folder)
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"'\.\./\.\./secret', outside"):
        refuse_code(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"not a pickle", pickle.dumps({"a": 1})])
def test_nonsense_is_refused(folder: Path, content: bytes) -> None:
    (folder / sharded.STATE_FOLDER / METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match="is refused"):
        refuse_code(folder)
