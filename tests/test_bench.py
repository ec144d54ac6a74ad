"""The benchmarks: that contestants get equal work, and that the scripts say what they promise."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from emu35.dida.layout import NoisyCopies
from emu35.model.mask import AttentionMask
from emu35.tokens.vocabulary import vocabulary_of


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The scripts' folder, from which its modules can be imported."""
    folder = repository / "scripts" / "bench"
    monkeypatch.syspath_prepend(str(folder))
    return folder


def figures(script: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.usefixtures("bench")
def test_both_forms_of_a_packed_row_describe_the_same_work() -> None:
    row = import_module("contestants").Row.of([3, 1, 4])
    batch = row.batch()
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    # Attention: the matrix that HF gets against the intervals that we get.
    ours_BSS = AttentionMask.causal(batch.document_start).dense(8)
    assert torch.equal(row.additive_mask()[0] == 0, ours_BSS)
    assert ours_BSS.sum().item() == 6 + 1 + 10
    # Loss: HF predicts label s + 1 from token s; ours come shifted already.
    theirs_BS = row.labels_unshifted()[:, 1:]
    assert batch.label_valid.tolist() == [[True, True, False, False, True, True, True, False]]
    assert torch.equal(theirs_BS >= 0, batch.label_valid[:, :-1])
    valid_BS = batch.label_valid[:, :-1]
    assert torch.equal(theirs_BS[valid_BS], batch.labels[:, :-1][valid_BS])


@pytest.mark.usefixtures("bench")
def test_the_packed_row_is_as_large_and_uneven_as_the_script_says() -> None:
    lengths = import_module("train_step").PACKED_LENGTHS
    assert (len(lengths), sum(lengths)) == (16, 8192)
    assert len(set(lengths)) == 16


@pytest.mark.usefixtures("bench")
def test_different_work_is_refused() -> None:
    check = import_module("rounds").check_equal
    check({"emu35": 9.06530, "HF Qwen3": 9.06535}, when="at the start", tolerance=1e-4)
    for wrong in (9.07, float("nan")):
        with pytest.raises(SystemExit, match=r"losses differ at the start: emu35 9\.06.*Qwen3"):
            check({"emu35": 9.06, "HF Qwen3": wrong}, when="at the start", tolerance=1e-4)
    same = import_module("loss").check_equal
    ones = (torch.ones([]), torch.ones(2), torch.ones(3))
    same(ones, ones)
    for wrong in (1.0 + 1e-4, float("nan")):
        with pytest.raises(SystemExit, match="weight gradient: ours is off"):
            same((*ones[:2], torch.full((3,), wrong)), ones)


@pytest.mark.usefixtures("bench")
def test_the_row_with_noisy_copies_is_full_of_them_and_as_long_as_the_script_says() -> None:
    step = import_module("dida_step")
    shape = step.RowShape(documents=2, side=30)
    assert shape.tokens == 8192
    copies = NoisyCopies(
        vocabulary=vocabulary_of(step.TOKENIZER),
        room=shape.noisy,
    )
    batch = copies(step.packed_row(shape))
    assert batch.tokens.shape == (1, shape.tokens)
    assert batch.noisy is not None
    assert batch.noisy.unique().tolist() == [-1, 0, 1, 2, 3]
    assert (batch.noisy >= 0).sum() == 4 * (30 * 30 + 30)
    # All but a few hundred columns are tokens that attend.
    assert (batch.document_start < shape.clean).float().mean() > 0.95


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_step_with_noisy_copies_by_segments_beside_the_dense_mask(bench: Path) -> None:
    found = figures(bench / "dida.py", "--quick")
    generation = ("forwards_per_image", "steps", "accuracy_ar", "accuracy_dida", "wall_ratio")
    assert found.keys() >= {*generation, "train_step_speedup", "device"}
    assert found["train_step_speedup"] > 0
    assert found["memory_power_segment"] < 1.3
    assert found["memory_mib_segment"][-1] < found["memory_mib_dense"][-1]


@pytest.mark.usefixtures("bench")
def test_memory_is_extended_along_straight_lines_only() -> None:
    line = import_module("loss").line
    assert line({1: 110, 2: 210, 4: 410}) == pytest.approx((100, 10))
    with pytest.raises(SystemExit, match="straight line"):
        line({1: 100, 2: 400, 4: 1600})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_loss_needs_an_eighth_of_the_plain_memory_and_as_much_as_planned(bench: Path) -> None:
    # Half a gibibyte does not hold the plain logits and their gradients, so they are extended.
    found = figures(bench / "loss.py", "--quick", "--memory", "0.5")
    assert found["plain_memory"] == "extended"
    # Log-probabilities, their gradient and that of the logits, fp32.
    assert found["plain_bytes_per_logit"] == pytest.approx(12, rel=0.05)
    assert found["mem_vs_plain"] <= 1 / 8
    assert found["planned_vs_measured"] == pytest.approx(1, abs=0.15)
    assert found["time_vs_plain"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_training_step_beside_its_rivals(bench: Path) -> None:
    found = figures(bench / "train_step.py", "--quick")
    # Timings of a few rounds decide nothing near 1; the packed row is a matter of several times.
    assert found["packed_vs_hf"] <= 0.5
    assert found["packed_documents"] == 16
    assert {"plain_vs_hf", "plain_vs_torch"} <= found.keys()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quantizer_beside_its_formulas_as_written(bench: Path) -> None:
    found = figures(bench / "ibq.py", "--quick")
    # At this size times say nothing; memory and exactness do.
    assert found["fused_mem_ratio"] < 0.8
    assert found["gradient_error"] < 1e-4
    assert found["encode_codes_different"] == 0
    assert {"fused_speedup", "fused_cpu_speedup", "encode_speedup"} <= found.keys()
