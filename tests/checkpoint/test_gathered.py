"""Whatever the layout, ranks gather what a release of the model would hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gathered_worker import built, gathered
from torchrun_ranks import run_ranks

from emu35.checkpoint.hf import to_hf
from emu35.model.lora import merge_adapters

WORKER = Path(__file__).with_name("gathered_worker.py")


def released(spec: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a release of one process's model holds, adapters merged."""
    _, (model,) = built({"lora": spec.get("lora")})
    merge_adapters(model)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return to_hf(state, config=model.lm_config, vocabulary_size=model.vocabulary_size)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1000, 10**8])
def test_one_process_gathers_its_own(lora: bool, bucket_bytes: int) -> None:
    mesh, chunks = built({"lora": lora})
    found = gathered(chunks, mesh=mesh, bucket_bytes=bucket_bytes)
    for name, tensor in released({"lora": lora}).items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize(
    "spec",
    [
        {"ranks": 2, "lora": True, "parallel": {"tp": 2, "sp": True}},
        {"ranks": 4, "lora": True, "parallel": {"tp": 2, "pp": 2}},
        {"ranks": 2, "parallel": {"pp": 2, "vpp": 2}},
        {"ranks": 4, "lora": True, "parallel": {"cp": 2, "zero1": True}},
    ],
    ids=["tp2", "tp2-pp2", "pp2-vpp2", "cp2-dp2"],
)
def test_ranks_gather_what_a_release_holds(tmp_path: Path, spec: dict[str, Any]) -> None:
    result = tmp_path / "result.pt"
    text = json.dumps({**spec, "bucket_bytes": 1500})
    run_ranks([str(WORKER), str(result), text], ranks=spec["ranks"], timeout=200)
    found = torch.load(result)
    for name, tensor in released(spec).items():
        assert torch.equal(found[name], tensor), name
