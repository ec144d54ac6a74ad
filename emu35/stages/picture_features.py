"""Pictures as vectors, for Frechet distances (:mod:`emu35.vision.frechet`)."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from emu35.errors import ConfigError

Picture = NDArray[np.uint8]
"""RGB [H, W, 3]."""

FeaturesOf = Callable[[Sequence[Picture]], NDArray[np.float64]]
"""Pictures of one size -> fp64 [N, D]."""

BATCH = 32
"""Pictures that go through a feature network at once."""


INCEPTION = "torch_fidelity"
"""The package that has Inception-v3 as FID uses it."""


def require_inception(*, asked: str, instead: str) -> None:
    """Refuse early what needs Inception-v3; ``asked`` is the setting that does, ``instead`` one
    that does not.

    Raises:
        ConfigError: torch-fidelity is not installed.
    """
    if find_spec(INCEPTION) is None:
        raise ConfigError(
            f"{asked} needs torch-fidelity, which is not installed; "
            f"pip install 'emu35[evaluate]', or use {instead}"
        )
