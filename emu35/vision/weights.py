"""Small files of weights, without running what they contain."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from emu35.errors import ConfigError


def read_weights(path: Path, *, owner: str) -> Mapping[str, torch.Tensor]:
    """The tensors of a safetensors file, or of a torch file that holds nothing but tensors, as
    fp32 on the CPU. ``owner`` begins the error messages: who wants them.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ConfigError(f"{owner}: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            found: object = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Reading a pickle that is none fails in a dozen ways: as KeyError, struct.error ...
        raise ConfigError(
            f"{owner}: {path} cannot be read as weights ({error}); give a "
            "safetensors file, or a torch file of a state dict"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in found.values()
    ):
        raise ConfigError(f"{owner}: {path} holds no state dict of tensors")
    return {str(name): tensor.float() for name, tensor in found.items()}
