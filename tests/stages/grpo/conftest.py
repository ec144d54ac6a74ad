"""What runs of reinforcement learning start from."""

from pathlib import Path

import pytest
from tiny_source import write_run

from emu35.config import SFTConfig


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with 512 positions, an image tokenizer beside it, and a model that answers with
    a picture nearly every time."""
    folder = tmp_path_factory.mktemp("grpo")
    return write_run(folder, positions=512, draws=True, eager=12.0, stage=SFTConfig())
