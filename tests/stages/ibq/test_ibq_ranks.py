"""Two ranks train what one process trains, with whole copies and with DeepSpeed's ZeRO-1."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizer_runs import (
    STEPS,
    assert_equal,
    copy_checkpoint,
    draw_pictures,
    every_term,
    make_config,
    rows_of,
    run_in,
    state_of,
    tensors_of,
)
from torchrun_ranks import run_ranks

from emu35.config import LaunchConfig, RunConfig
from emu35.config.io import write_config

COMPARED = ("loss", "logits", "entropy", "grad_norm", "lr", "codebook", "tokens_total")

WORKER = Path(__file__).with_name("ranks_worker.py")


def two_ranks(pictures: Path, *, zero1: bool) -> RunConfig:
    """Each rank brings half of the micro-batch of the process alone."""
    config = make_config(pictures, micro_batch_size=2, **every_term())
    config.launch = LaunchConfig(nproc=2)
    config.parallel = replace(config.parallel, zero1=zero1)
    return config


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory) -> Path:
    """One process, one micro-batch of four pictures a step."""
    run_dir = tmp_path_factory.mktemp("alone")
    run_in(run_dir, make_config(pictures, micro_batch_size=4, **every_term()))
    return run_dir


@pytest.fixture(scope="module")
def together(alone, pictures, tmp_path_factory) -> dict[str, Path]:
    """Run folders of two ranks, made by the same processes one after another."""
    folder = tmp_path_factory.mktemp("together")
    for name, zero1 in (("zero", True), ("plain", False)):
        write_config(two_ranks(pictures, zero1=zero1), folder / f"{name}.yaml")
    names = ("zero", "plain", "refused", "from_alone")
    folders = {name: folder / name for name in names}
    for path in folders.values():
        path.mkdir()
    copy_checkpoint(alone, step=3, to=folders["from_alone"])
    jobs: list[dict[str, Any]] = [
        {"config": str(folder / ("plain.yaml" if name == "plain" else "zero.yaml"))}
        | {"run_dir": str(path)}
        for name, path in folders.items()
    ]
    jobs[names.index("refused")]["refuse_after"] = 3
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_ranks([str(WORKER), str(folder / "jobs.json")], ranks=2, timeout=280)
    return folders


def assert_same_training(ours: Path, theirs: Path, *, first: int = 1) -> None:
    mine, reference = rows_of(ours), rows_of(theirs)
    for step in range(first, STEPS + 1):
        names = [
            name
            for name in reference[step]
            if name.startswith(
                ("loss", "logits", "entropy", "grad_norm", "lr", "codebook", "tokens_total")
            )
        ]
        assert len(names) > 10
        for name in names:
            assert mine[step][name] == pytest.approx(reference[step][name], rel=2e-3, abs=1e-5), (
                step,
                name,
            )
    got, wanted = (tensors_of(state_of(run, step=STEPS)) for run in (ours, theirs))
    begun = tensors_of(state_of(theirs, step=3))
    assert got.keys() == wanted.keys()
    # Adam divides by the gradient's own size, so where a gradient is all rounding its update is
    # noise: what is compared is the way of each network as a whole.
    for network in ("/networks/tokenizer/", "/networks/projector/", "/networks/adversary/"):
        names = [
            name
            for name, tensor in wanted.items()
            if name.startswith(network) and tensor.is_floating_point()
        ]
        apart = sum(float((got[name] - wanted[name]).square().sum()) for name in names)
        way = sum(float((wanted[name] - begun[name]).square().sum()) for name in names)
        assert apart**0.5 < 0.02 * way**0.5, network
    for name, tensor in wanted.items():
        if name.endswith("/updates"):
            assert torch.equal(got[name], tensor), name


@pytest.mark.multiproc
@pytest.mark.parametrize("name", ["zero", "plain"])
def test_two_ranks_are_one_process(name, together, alone):
    assert_same_training(together[name], alone)


@pytest.mark.multiproc
def test_a_refused_step_changes_nothing_that_zero1_holds(together):
    ours, theirs = state_of(together["refused"], step=STEPS), state_of(together["zero"], step=3)
    assert_equal(ours, theirs)


@pytest.mark.multiproc
def test_a_checkpoint_of_one_process_goes_on_with_zero1(together, alone):
    assert_same_training(together["from_alone"], alone, first=4)


@pytest.mark.multiproc
def test_a_checkpoint_of_zero1_goes_on_in_one_process(together, alone, pictures, tmp_path):
    run_dir = tmp_path / "run"
    copy_checkpoint(together["zero"], step=3, to=run_dir)
    run_in(run_dir, make_config(pictures, micro_batch_size=4, **every_term()))
    assert_same_training(run_dir, alone, first=4)
