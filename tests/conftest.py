"""What every test shares."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("emu35", deadline=None)
settings.load_profile("emu35")

# Two ranks on two cores with two threads each would spend their time waiting for one another.
# Set before torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

# A shell that starts the tests in the background has them ignore Ctrl-C, and all they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Values made by the official inference code."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def table() -> Path:
    """The released text table, fetched into the cache the way a user fetches it.

    Without it and without a network a test fails with the message a user would see, rather than
    pass by being skipped.
    """
    from emu35.tokens.fetch import fetch_table

    return fetch_table()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's top folder."""
    return Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is none, so that a bare ``pytest`` works anywhere."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def fruit_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short sentences as token shards; read only."""
    from fruit import write_fruit

    return write_fruit(tmp_path_factory.mktemp("fruit"))
