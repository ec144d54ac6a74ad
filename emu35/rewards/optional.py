"""Packages that only some rewards need: imported when the reward is made, not before."""

from importlib import import_module
from types import ModuleType

from emu35.errors import ConfigError


def optional(module: str, *, reward: str) -> ModuleType:
    """Import ``module`` for the reward of kind ``reward``.

    Raises:
        ConfigError: it is not installed, or cannot be loaded here.
    """
    try:
        return import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        # OSError is a shared library that is missing; RuntimeError what packages on top of torch
        # say where they were built for another one.
        raise ConfigError(
            f"reward kind {reward!r} needs {module}, which cannot be imported ({error}); "
            "pip install 'emu35[rewards]', or leave the reward out"
        ) from error
