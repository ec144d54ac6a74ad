"""A source that every test of distillation reads and none changes."""

from pathlib import Path

import pytest
from tiny_source import write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with 512 positions."""
    return write_run(tmp_path_factory.mktemp("distill"), positions=512)
