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


def require_inception() -> None:
    """Refuse early what ``features=inception`` lacks.

    Raises:
        ConfigError: torch-fidelity is not installed.
    """
    if find_spec("torch_fidelity") is None:
        raise ConfigError(
            "stage.features=inception needs torch-fidelity, which is not installed; "
            "pip install 'emu35[evaluate]', or use stage.features=tokenizer"
        )
