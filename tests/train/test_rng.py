"""Random number generators: what is saved comes back, in the same process and in a file."""

import random
from pathlib import Path

import numpy as np
import torch

from emu35.config import ParallelConfig
from emu35.parallel.mesh import init_mesh
from emu35.train import rng


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),  # keeps a second number back
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(1).item(),
    ]


def test_saved_generators_repeat_the_same_numbers(tmp_path: Path) -> None:
    draw()
    rng.save(tmp_path)
    expected = [draw() for _ in range(3)]
    assert rng.load(tmp_path)
    assert [draw() for _ in range(3)] == expected


def test_preserved_hides_whatever_the_body_draws() -> None:
    state = rng.capture()
    expected = draw()
    rng.restore(state)
    with rng.preserved():
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        draw()
    assert draw() == expected


def test_generators_of_another_number_of_ranks_are_refused(tmp_path: Path) -> None:
    rng.save(tmp_path)
    (file,) = tmp_path.iterdir()
    state = torch.load(file, weights_only=True)
    torch.save({**state, "layout": {**state["layout"], "world": 2}}, file)
    before = rng.capture()["torch"]
    assert not rng.load(tmp_path)
    assert torch.equal(rng.capture()["torch"], before)
    file.unlink()
    assert not rng.load(tmp_path)


def test_megatron_dropout_tracker_is_part_of_the_state(tmp_path: Path) -> None:
    init_mesh(ParallelConfig(), seed=3)
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    assert tracker is not None

    def drop() -> torch.Tensor:
        with tracker.fork():
            return torch.rand(5)

    drop()
    rng.save(tmp_path)
    expected = [drop(), drop()]
    assert not torch.equal(*expected)
    assert rng.load(tmp_path)
    assert all(torch.equal(drop(), number) for number in expected)


def test_generators_of_another_layout_of_as_many_ranks_are_refused(tmp_path: Path) -> None:
    """Two replicas drop different units; as two tensor-parallel ranks they must drop the same."""
    init_mesh(ParallelConfig(), seed=3)
    rng.save(tmp_path)
    (file,) = tmp_path.iterdir()
    state = torch.load(file, weights_only=True)
    assert state["layout"]["tp"] == 1
    torch.save({**state, "layout": {**state["layout"], "tp": 2}}, file)
    before = rng.capture()["torch"]
    assert not rng.load(tmp_path)
    assert torch.equal(rng.capture()["torch"], before)
