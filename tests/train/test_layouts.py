"""One truth: the same losses from every layout, micro-batch size and packing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("layout_worker.py")


def train(result: Path, *, ranks: int = 1, **spec: object) -> dict:
    """Run the worker alone or on ``ranks`` ranks."""
    launch(WORKER, result, spec, ranks=ranks)
    return json.loads(result.read_text())


def launch(script: Path, place: Path, spec: dict, *, ranks: int, timeout: float = 240) -> None:
    """Run ``script`` alone or on ``ranks`` torchrun ranks, and end whatever it leaves behind."""
    command = [str(script), str(place), json.dumps(spec)]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*torchrun, *command]
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train(tmp_path_factory.mktemp("reference") / "one.json")


def assert_same(run: dict, reference: dict) -> None:
    """Closely for three steps. From then on Adam, which divides each gradient by its own size, has
    turned the rounding of near-zero gradients into updates: losses stay near, norms drift."""
    ours, theirs = run["metrics"], reference["metrics"]
    assert len(ours) == len(theirs) == 5
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a["tokens"] == b["tokens"]
        for name in ("loss", "loss_text", "loss_visual"):
            assert a[name] == pytest.approx(b[name], rel=1e-5 if step > 2 else 1e-6), name
        if step <= 2:
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert run["validation"] == pytest.approx(reference["validation"], rel=1e-5)


LAYOUTS = {
    "tp2": {"ranks": 2, "tp": 2},
    "dp2-zero1": {"ranks": 2, "zero1": True},
    "cp2": {"ranks": 2, "cp": 2},
}
MORE_LAYOUTS = {
    "tp2-sp": {"ranks": 2, "tp": 2, "sp": True},
    "dp2": {"ranks": 2},
    "pp2": {"ranks": 2, "pp": 2},
    "pp2-vpp2": {"ranks": 2, "pp": 2, "vpp": 2},
    "cp2-a2a": {"ranks": 2, "cp": 2, "cp_comm_type": "a2a"},
    "cp4": {"ranks": 4, "cp": 4},
    "cp4-a2a": {"ranks": 4, "cp": 4, "cp_comm_type": "a2a"},
    "tp2-cp2-sp-zero1": {"ranks": 4, "tp": 2, "cp": 2, "sp": True, "zero1": True},
    "pp2-cp2": {"ranks": 4, "pp": 2, "cp": 2},
    "tp2-dp2-zero1": {"ranks": 4, "tp": 2, "zero1": True, "micro_batch_size": 1},
}


@pytest.mark.multiproc
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_two_ranks_train_what_one_trains(layout: dict, reference: dict, tmp_path: Path) -> None:
    assert_same(train(tmp_path / "run.json", **layout), reference)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("layout", MORE_LAYOUTS.values(), ids=MORE_LAYOUTS)
def test_more_layouts_train_what_one_trains(layout: dict, reference: dict, tmp_path: Path) -> None:
    assert_same(train(tmp_path / "run.json", **layout), reference)


@pytest.mark.parametrize(
    "split",
    [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"packed": False, "micro_batch_size": 4}],
    ids=["micro1", "micro4", "unpacked"],
)
def test_micro_batches_and_packing_do_not_change_the_loss(
    split: dict, reference: dict, tmp_path: Path
) -> None:
    assert_same(train(tmp_path / "run.json", **split), reference)


def test_bf16_trains_close_to_fp32(reference: dict, tmp_path: Path) -> None:
    run = train(tmp_path / "run.json", precision="bf16")
    for a, b in zip(run["metrics"], reference["metrics"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
