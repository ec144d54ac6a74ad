import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from emu35.checkpoint.safetensor_files import INDEX, SafetensorFolder, write_safetensors
from emu35.errors import ReleaseError


def tensors() -> dict[str, torch.Tensor]:
    matrix = torch.arange(48, dtype=torch.float32).view(8, 6)
    return {
        "model.embed_tokens.weight": matrix,
        "model.layers.2.a.weight": matrix[:4],
        "model.layers.10.a.weight": matrix[4:],
        "model.layers.10.b.weight": matrix.t(),
        "lm_head.weight": torch.ones(3),
    }


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_one_file_with_an_index(tmp_path: Path) -> None:
    assert write_safetensors(tensors(), folder=tmp_path) == ["model.safetensors", INDEX]
    folder = SafetensorFolder(tmp_path)
    assert folder.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert torch.equal(folder[name], tensor)
    assert folder.dtype is torch.float32


def test_weights_are_as_readable_as_any_other_file(tmp_path: Path) -> None:
    write_safetensors(tensors(), folder=tmp_path)
    (tmp_path / "other").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_shards_respect_the_limit_and_name_their_count(tmp_path: Path) -> None:
    names = write_safetensors(tensors(), folder=tmp_path, max_shard_bytes=204)
    assert names == [*(f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)), INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors().values())
    assert index["weight_map"]["lm_head.weight"] == "model-00003-of-00003.safetensors"
    folder = SafetensorFolder(tmp_path)
    assert all(torch.equal(folder[name], tensor) for name, tensor in tensors().items())


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_safetensors(tensors(), folder=tmp_path / name, max_shard_bytes=204)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_conversion_to_bf16_halves_the_size(tmp_path: Path) -> None:
    write_safetensors(tensors(), folder=tmp_path, dtype=torch.bfloat16)
    folder = SafetensorFolder(tmp_path)
    assert folder.dtype is torch.bfloat16
    name = "model.embed_tokens.weight"
    assert torch.equal(folder[name], tensors()[name].bfloat16())


def test_a_single_file_without_index_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert torch.equal(SafetensorFolder(tmp_path)["a"], torch.ones(2))


def edit_index(folder: Path, *, name: str, file: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/x.safetensors", "model.ckpt", ""])
def test_an_index_cannot_lead_outside(tmp_path: Path, file: str) -> None:
    write_safetensors(tensors(), folder=tmp_path)
    edit_index(tmp_path, name="lm_head.weight", file=file)
    with pytest.raises(ReleaseError, match="no safetensors file beside it"):
        SafetensorFolder(tmp_path)


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    write_safetensors(tensors(), folder=tmp_path)
    edit_index(tmp_path, name="model.extra.weight", file="model.safetensors")
    with pytest.raises(ReleaseError, match=r"lacks the tensor model\.extra\.weight"):
        SafetensorFolder(tmp_path)


def test_missing_truncated_and_overlong_files_are_named(tmp_path: Path) -> None:
    write_safetensors(tensors(), folder=tmp_path, max_shard_bytes=204)
    victim = tmp_path / "model-00002-of-00003.safetensors"
    content = victim.read_bytes()
    os.truncate(victim, len(content) - 1)
    with pytest.raises(ReleaseError, match=r"model-00002-of-00003.* damaged or truncated"):
        SafetensorFolder(tmp_path)
    victim.write_bytes(content + b"\0")
    with pytest.raises(ReleaseError, match=r"model-00002-of-00003.* damaged or truncated"):
        SafetensorFolder(tmp_path)
    victim.unlink()
    with pytest.raises(ReleaseError, match=r"model-00002-of-00003.* is missing"):
        SafetensorFolder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"weight_map": 3}', b"\xff"])
def test_a_broken_index_is_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    write_safetensors(tensors(), folder=tmp_path)
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(ReleaseError, match="no index of weights"):
        SafetensorFolder(tmp_path)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ReleaseError, match="damaged or truncated"):
        SafetensorFolder(tmp_path)


def test_integers_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(ReleaseError, match="has type I64"):
        SafetensorFolder(tmp_path)
