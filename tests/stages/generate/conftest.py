"""A source that every test of generation reads and none changes."""

from pathlib import Path

import pytest
from tiny_source import write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with 256 positions: room for a few small pictures."""
    return write_run(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="session")
def storyteller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose model draws often, with positions for a dialogue."""
    return write_run(tmp_path_factory.mktemp("storyteller"), positions=4096, draws=True)
