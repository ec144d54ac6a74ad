"""Two gloo ranks play the adversarial game that one rank plays, batch statistics included."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrun_ranks import run_ranks

from emu35.vision.ibq.objective.batch_norm import CrossRankBatchNorm

WORKER = Path(__file__).with_name("adversary_worker.py")


def game(tmp_path: Path, *, ranks: int) -> dict[str, torch.Tensor]:
    result = tmp_path / f"{ranks}.pt"
    run_ranks([str(WORKER), str(result)], ranks=ranks, timeout=120)
    return torch.load(result, weights_only=True)


@pytest.mark.multiproc
def test_two_ranks_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = game(tmp_path, ranks=2)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    one = game(tmp_path, ranks=1)
    assert set(one) == set(two)
    assert {"hinge", "anchors.real", "gradient of discriminator.main.3.weight"} <= set(one)
    assert float(one["anchors.real"].abs()) > 0
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-7, msg=name)


def test_alone_it_is_batch_norm() -> None:
    torch.manual_seed(0)
    ours, theirs = CrossRankBatchNorm(5, group=None), nn.BatchNorm2d(5)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(2):
        x_BCHW = torch.randn(3, 5, 4, 4) * 2 + 7
        torch.testing.assert_close(ours(x_BCHW), theirs(x_BCHW))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, msg=name)
