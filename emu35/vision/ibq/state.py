"""What every layout of a tokenizer's weights is held to: the names and shapes of its config."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from emu35.errors import ReleaseError

CODEBOOK = "quantize.embedding.weight"

_NAMED = 3
"""How many missing or unexpected keys a message names before it counts the rest."""


def check_state(
    state: Mapping[str, torch.Tensor],
    *,
    expected: Mapping[str, torch.Tensor],
    path: Path,
    config: str,
) -> None:
    """Check that ``state``, read from ``path``, has the names and shapes of ``expected``, which
    the file ``config`` beside it describes.

    Raises:
        ReleaseError: naming what is missing, unknown or of another shape or kind of number.
    """
    strange = [key for key in state if not isinstance(cast(object, key), str)]
    if strange:
        raise ReleaseError(f"{path} has the key {strange[0]!r}, which is no name; copy it again")
    problems = [
        f"{title} {_some(sorted(names))}"
        for title, names in (
            ("lacks", expected.keys() - state.keys()),
            ("has unknown", state.keys() - expected.keys()),
        )
        if names
    ]
    problems += [
        f"{name} is {list(state[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ][:_NAMED]
    problems += [
        f"{name} is of type {tensor.dtype}, no floating-point one"
        for name, tensor in state.items()
        if name in expected and not tensor.is_floating_point()
    ][:_NAMED]
    if problems:
        raise ReleaseError(f"{path} does not fit the {config} beside it: " + "; ".join(problems))


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
