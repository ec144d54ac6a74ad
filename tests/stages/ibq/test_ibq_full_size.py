"""The paper's tokenizer composes, builds and makes a step on a CPU."""

import json
from pathlib import Path

import pytest
from tokenizer_runs import draw_pictures
from torchrun_ranks import run_ranks

from emu35.config import IBQStageConfig, Precision
from emu35.run.compose import compose

WORKER = Path(__file__).with_name("full_size_worker.py")
PARAMETERS = 455_336_963


def test_the_experiment_is_the_papers() -> None:
    config = compose(["experiment=ibq/455m"])
    stage, optim = config.stage, config.optim
    assert isinstance(stage, IBQStageConfig)
    assert (stage.steps, stage.global_batch_size) == (500_000, 256)
    assert (optim.lr, optim.warmup_steps, optim.weight_decay) == (1e-4, 15_000, 0.0)
    assert list(optim.betas) == [0.5, 0.9]
    assert config.parallel.zero1
    assert stage.precision is Precision.bf16
    terms = (stage.perceptual, stage.adversarial, stage.distillation, stage.entropy)
    assert all(term.weight > 0 for term in terms)


@pytest.mark.slow
def test_a_step_of_every_term_fits_into_memory(tmp_path: Path) -> None:
    pictures, run_dir = tmp_path / "pictures", tmp_path / "run"
    pictures.mkdir()
    run_dir.mkdir()
    draw_pictures(pictures)
    output = run_ranks([str(WORKER), str(pictures), str(run_dir)], ranks=1, timeout=280)
    found = json.loads(output.splitlines()[-1])
    numbers = found["numbers"]
    assert found["parameters"] == PARAMETERS
    assert numbers["tokens"] == 16
    assert numbers["loss_discriminator"] > 0
    # Rows that no latent vector chose have a gradient too, and move where it is not far below the
    # epsilon of Adam.
    assert found["moved"] > numbers["tokens"]
    # Weights, their average, gradients and two moments in fp32, and a tenth for everything else.
    assert found["peak_bytes"] < 1.2 * 5 * 4 * PARAMETERS + 2**30
