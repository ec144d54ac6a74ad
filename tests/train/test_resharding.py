"""A checkpoint of any layout continues in any other, and in its own bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchrun_ranks import run_ranks

WORKER = Path(__file__).with_name("reshard_worker.py")

LAYOUTS = {
    2: {
        "tp2-sp": {"tp": 2, "sp": True},
        "pp2-vpp2": {"pp": 2, "vpp": 2},
        "cp2": {"cp": 2},
        "dp2-zero1": {"zero1": True},
    },
}
SINGLE = {1: {"single": {}}}
LARGER = {
    4: {
        "tp2-sp-dp2-zero1": {"tp": 2, "sp": True, "zero1": True, "micro_batch_size": 1},
        "pp2-dp2-zero1": {"pp": 2, "zero1": True, "micro_batch_size": 1},
        "cp2-dp2-zero1": {"cp": 2, "zero1": True, "micro_batch_size": 1},
        "tp2-pp2-vpp2": {"tp": 2, "pp": 2, "vpp": 2},
    }
}
Layouts = dict[int, dict[str, dict]]
Pairs = list[tuple[str, str]]


def all_pairs(layouts: Layouts) -> Pairs:
    names = [name for here in layouts.values() for name in here]
    return [(name, other) for name in names for other in names]


def reshard(
    root: Path, layouts: Layouts, *, pairs: Pairs, precision: str, dropout: float = 0.0
) -> None:
    """Save in every layout, then load as ``pairs`` say; at most two launches a size of world."""
    spec = {"precision": precision, "dropout": dropout}
    saved: set[str] = set()
    rest = list(pairs)
    for again in (False, True):
        for ranks, here in layouts.items():
            saved |= here.keys()
            now = [pair for pair in rest if pair[0] in saved and pair[1] in here]
            rest = [pair for pair in rest if pair not in now]
            load = [(name, other, here[other]) for name, other in now]
            if load or not again:
                spec |= {"save": {} if again else here, "load": load}
                run_ranks([str(WORKER), str(root), json.dumps(spec)], ranks=ranks, timeout=1500)
    assert not rest


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, whole, by torch's own converter."""
    whole = checkpoint.with_suffix(".pt")
    if not whole.exists():
        dcp_to_torch_save(checkpoint / "state", whole)
    found = torch.load(whole, weights_only=True)
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def check(root: Path, *, pairs: Pairs, precision: str) -> None:
    for name, other in pairs:
        truth, again = tensors(root / name), tensors(root / f"{name}--{other}")
        kinds = {key.split(".")[2] for key in truth if key.startswith("optimizer.state.")}
        masters = {"fp32_param"} if precision == "bf16" else set()
        assert kinds == {"exp_avg", "exp_avg_sq"} | masters
        assert again.keys() == truth.keys()
        for key, tensor in truth.items():
            rows = min(len(tensor), len(again[key]))  # tp pads the vocabulary
            assert again[key].dtype == tensor.dtype
            assert torch.equal(again[key][:rows], tensor[:rows]), (name, other, key)
        run, uninterrupted = read(root / f"{name}--{other}.json"), read(root / f"{name}.json")
        if name == other:
            assert run == uninterrupted, name
        elif precision == "fp32":
            assert_close(run, uninterrupted, pair=f"{name} -> {other}")


def assert_close(run: dict, uninterrupted: dict, *, pair: str) -> None:
    for ours, theirs in zip(run["metrics"], uninterrupted["metrics"], strict=True):
        assert ours["tokens"] == theirs["tokens"], pair
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), pair
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), pair


@pytest.mark.slow
@pytest.mark.multiproc
def test_layouts_continue_themselves_bitwise_and_each_other(tmp_path: Path) -> None:
    """A round through all of them; every pair is in the slow suite."""
    names = list(LAYOUTS[2])
    pairs = list(zip(names, names, strict=True))
    pairs += list(zip(names, names[1:] + names[:1], strict=True))
    reshard(tmp_path, LAYOUTS, pairs=pairs, precision="fp32")
    check(tmp_path, pairs=pairs, precision="fp32")


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.timeout(3600)
def test_every_pair_of_layouts(tmp_path: Path) -> None:
    layouts = {**SINGLE, **LAYOUTS, **LARGER}
    pairs = all_pairs(layouts)
    reshard(tmp_path, layouts, pairs=pairs, precision="fp32")
    check(tmp_path, pairs=pairs, precision="fp32")


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.timeout(1800)
def test_fp32_masters_of_bf16_survive_exactly_and_dropout_goes_on(tmp_path: Path) -> None:
    layouts = {**SINGLE, **LAYOUTS}
    pairs = all_pairs(layouts)
    reshard(tmp_path, layouts, pairs=pairs, precision="bf16", dropout=0.1)
    check(tmp_path, pairs=pairs, precision="bf16")
