"""The tokenizer stage with every term of the objective: what is logged, resumed, refused, saved."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizer_runs import (
    START_STEP,
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

from emu35.config import (
    AdversarialConfig,
    DistillationConfig,
    IBQStageConfig,
    PerceptualConfig,
    PerceptualKind,
    Precision,
)
from emu35.config.io import write_config
from emu35.config.rules import find_problems
from emu35.errors import CheckpointError
from emu35.stages.ibq import stage as ibq
from emu35.stages.ibq.engine import PlainEngine
from emu35.stages.ibq.task import DISCRIMINATOR, IBQTask


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("every_term")
    run_in(run_dir, make_config(pictures, **every_term()))
    return run_dir


def test_the_loss_is_the_weighted_sum_of_what_is_logged(finished, pictures):
    config = make_config(pictures, **every_term())
    stage = config.stage
    assert isinstance(stage, IBQStageConfig)
    for step, row in rows_of(finished).items():
        felt = stage.adversarial.weight if step >= START_STEP else 0.0
        expected = (
            row["loss_reconstruction"]
            + stage.mse_weight * row["loss_mse"]
            + row["loss_quantization"]
            + stage.perceptual.weight * row["loss_perceptual"]
            + stage.entropy.weight * row["loss_entropy"]
            + stage.distillation.weight * row["loss_distillation"]
            + felt * row["loss_generator"]
        )
        assert row["loss"] == pytest.approx(expected, rel=1e-4), step
        assert row["loss_entropy"] == pytest.approx(
            row["entropy_sample"] - row["entropy_codebook"], abs=1e-4
        )
        assert row["loss_perceptual"] > 0
        assert (row["loss_generator"] > 0) == (step >= START_STEP)
        assert (row["entropy_codebook"] > 0) == (step > 2)  # two steps know no codebook


def test_the_discriminator_begins_at_its_step(finished, pictures, tmp_path):
    rows = rows_of(finished)
    names = ("loss_discriminator", "loss_lecam", "logits_real", "grad_norm_discriminator")
    for step in range(1, STEPS + 1):
        assert all((name in rows[step]) == (step >= START_STEP - 1) for name in names), step
    row = rows[STEPS - 1]
    assert row["loss_discriminator"] == pytest.approx(
        row["loss_hinge"] + 0.05 * row["loss_lecam"], rel=1e-5
    )
    # Its own rate on the schedule of the generator's, twice as high.
    assert row["lr_discriminator"] == pytest.approx(2 * row["lr"])
    begun = state_of(finished, step=3)
    assert {entry["updates"] for entry in begun["moments"][DISCRIMINATOR].values()} == {1}
    late = every_term() | {
        "adversarial": AdversarialConfig(weight=0.2, start_step=9, ndf=8, layers=2)
    }
    run_in(tmp_path / "late", make_config(pictures, **late))
    first, last = (state_of(tmp_path / "late", step=step) for step in (3, STEPS))
    assert_equal(first["networks"]["adversary"], last["networks"]["adversary"])
    assert last["moments"][DISCRIMINATOR] == {}


def test_the_two_do_not_train_each_other(finished, pictures, tmp_path):
    """Neither gets a gradient from the other's loss: a generator that feels nothing of it makes the
    same steps with and without a discriminator, and the projector is not in the release."""
    deaf = every_term() | {
        "adversarial": AdversarialConfig(
            weight=0.2, start_step=9, discriminator_start=1, ndf=8, layers=2
        )
    }
    run_in(tmp_path / "deaf", make_config(pictures, **deaf))
    alone = every_term() | {"adversarial": AdversarialConfig()}
    run_in(tmp_path / "alone", make_config(pictures, **alone))
    ours, theirs = (state_of(tmp_path / name, step=STEPS) for name in ("deaf", "alone"))
    assert_equal(ours["networks"]["tokenizer"], theirs["networks"]["tokenizer"])
    assert_equal(ours["average"], theirs["average"])


def test_resume_is_bitwise(finished, pictures, tmp_path):
    run_dir = tmp_path / "resumed"
    copy_checkpoint(finished, step=3, to=run_dir)
    run_in(run_dir, make_config(pictures, **every_term()))
    resumed, whole = rows_of(run_dir), rows_of(finished)
    for step in range(4, STEPS + 1):
        for name, value in whole[step].items():
            if name.startswith(("loss", "logits", "entropy", "grad_norm", "lr")):
                assert resumed[step][name] == value, (step, name)
    assert_equal(state_of(run_dir, step=STEPS), state_of(finished, step=STEPS))


@pytest.mark.parametrize("bad", ["generator", "discriminator", "spike"])
def test_a_refused_step_changes_nothing_of_either_network(
    bad, finished, pictures, tmp_path, monkeypatch
):
    """Steps 4 to 6 are bad for one of the two: what step 3 left stays, bit for bit."""
    reduce, accepts = PlainEngine.reduce, IBQTask._accepts
    task: list[IBQTask] = []

    def remember(self, *arguments, **options):
        task[:] = [self]
        build(self, *arguments, **options)

    build = IBQTask.__init__
    monkeypatch.setattr(IBQTask, "__init__", remember)

    def spoiled(self):
        if task[0].clock.step > 3 and bad in task[0].engines and self is task[0].engines[bad]:
            next(iter(self._weights.values())).grad.fill_(float("nan"))
        return reduce(self)

    def refused(self, losses, *, norms):
        if self.clock.step > 3 and bad == "spike":
            self.guard.refuse("a spike")
            return False
        return accepts(self, losses, norms=norms)

    monkeypatch.setattr(PlainEngine, "reduce", spoiled)
    monkeypatch.setattr(IBQTask, "_accepts", refused)
    run_in(tmp_path / "bad", make_config(pictures, **every_term()))
    assert_equal(state_of(tmp_path / "bad", step=STEPS), state_of(finished, step=3))
    rows = rows_of(tmp_path / "bad")
    assert rows[STEPS]["skipped_steps"] == 3
    # The data went on: the losses are those of other pictures.
    assert rows[4]["loss"] != rows[5]["loss"]


def test_terms_of_weight_0_load_nothing_and_log_nothing(pictures, tmp_path):
    off = {
        "perceptual": PerceptualConfig(kind=PerceptualKind.lpips, weights="nowhere.safetensors"),
        "distillation": DistillationConfig(teacher="nowhere"),
    }
    task = IBQTask(make_config(pictures, **off), run_dir=tmp_path, device=torch.device("cpu"))
    numbers = task.train_step(1)
    task.close()
    assert set(task.engines) == {"generator"}
    assert {name for name in numbers if "loss" in name or "entropy" in name} == {
        "loss",
        "loss_reconstruction",
        "loss_quantization",
    }
    task.save(tmp_path)
    content = torch.load(tmp_path / "ibq.pt", weights_only=True)
    assert set(content["networks"]) == {"tokenizer"}


def test_gradient_accumulation_changes_no_term_that_is_a_mean_over_pictures(pictures, tmp_path):
    """Batch norm and the codebook's entropy are of one micro-batch; without them, a step in two
    micro-batches is the step in one."""
    terms = every_term()
    terms["adversarial"] = AdversarialConfig()
    terms["entropy"].codebook_weight = 0.0
    found = {}
    for size in (2, 4):
        config = make_config(pictures, micro_batch_size=size, steps=4, **terms)
        run_in(tmp_path / str(size), config)
        found[size] = rows_of(tmp_path / str(size))
    for step in range(1, 5):
        for name in ("loss", "loss_perceptual", "loss_distillation", "entropy_sample"):
            assert found[2][step][name] == pytest.approx(found[4][step][name], rel=1e-3, abs=1e-6)


def test_bf16_is_near_fp32_and_keeps_fp32_weights(finished, pictures, tmp_path):
    run_in(tmp_path / "bf16", make_config(pictures, precision=Precision.bf16, **every_term()))
    ours, theirs = rows_of(tmp_path / "bf16"), rows_of(finished)
    for name in ("loss", "loss_perceptual", "loss_distillation"):
        assert ours[1][name] == pytest.approx(theirs[1][name], rel=0.05), name
        assert ours[1][name] != theirs[1][name]
    for name, tensor in tensors_of(state_of(tmp_path / "bf16", step=STEPS)).items():
        assert tensor.dtype in (torch.float32, torch.int64), name


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from emu35.config.io import read_config
from emu35.stages.ibq import stage
save, saves = torch.save, []
def half(content, path):
    saves.append(path)
    save(content, path)
    if len(saves) == 2:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
stage.run(read_config(Path(sys.argv[1])), run_dir=Path(sys.argv[2]))
"""


def test_killed_in_a_save_the_run_goes_on_from_the_one_before(finished, pictures, tmp_path):
    config = make_config(pictures, **every_term())
    write_config(config, tmp_path / "config.yaml")
    (tmp_path / "killed.py").write_text(KILLED)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    done = subprocess.run(
        [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "config.yaml"), str(run_dir)],
        env={**os.environ, "PYTHONPATH": str(Path(ibq.__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert not (run_dir / "checkpoints" / f"step_{STEPS:08d}").exists()
    run_in(run_dir, config)
    assert_equal(state_of(run_dir, step=STEPS), state_of(finished, step=STEPS))


def test_a_checkpoint_of_another_objective_is_refused(finished, pictures, tmp_path):
    wider = AdversarialConfig(weight=0.2, layers=2, ndf=16)
    for terms, message in (
        ({}, "but this objective trains tokenizer;"),
        (every_term() | {"adversarial": wider}, "another architecture"),
    ):
        config = make_config(pictures, **terms)
        task = IBQTask(config, run_dir=tmp_path, device=torch.device("cpu"))
        with pytest.raises(CheckpointError, match=message):
            task.load(finished / "checkpoints/step_00000003")
        task.close()


def test_terms_that_do_not_fit_the_pictures_are_refused(pictures):
    config = make_config(pictures, **every_term())
    stage = config.stage
    assert isinstance(stage, IBQStageConfig)
    assert not list(find_problems(config))
    stage.adversarial.layers = 4
    stage.distillation.layer = 9
    stage.entropy.temperature = 0.0
    stage.perceptual.kind = PerceptualKind.lpips
    stage.distillation.seed = 2**70
    stage.adversarial.weight = float("inf")
    text = "\n".join(find_problems(config))
    assert "stage.adversarial.layers=4 needs pictures of 48 pixels" in text
    assert "stage.distillation.layer=9 is beyond" in text
    assert "stage.entropy.temperature=0.0 must be finite and at least 1e-6" in text
    assert "stage.distillation.seed=1180591620717411303424 must lie in 0..4294967295" in text
    assert "stage.adversarial.weight=inf must be finite" in text
    assert "stage.perceptual.weights is empty" in text
